# SPDX-License-Identifier: MIT
"""Talk to the chat server from the command line.

python py_api.py                          the tutorial's example
python py_api.py "天空为什么是蓝色的？"       one question of your own
python py_api.py --chat                   a conversation; Ctrl-D ends it
python py_api.py --url http://127.0.0.1:8000/ --key SECRET "Hello!"

A key can also be given in the environment variable PHI4_API_KEY. Where there is no
answer, one line on stderr says why, and the exit code is 1.
"""

import argparse
import contextlib
import json
import os
import sys

import requests

EXAMPLE_PROMPT = "刚才我们再聊什么？"
EXAMPLE_HISTORY = [
    {"role": "user", "content": "今天星期几"},
    {"role": "assistant", "content": "今天星期三"},
    {"role": "user", "content": "明天星期几？"},
    {"role": "assistant", "content": "明天是星期四。"},
]
# Seconds to connect, and seconds to wait for the next bytes of the answer.
TIMEOUT = (10, 1800)


class ChatError(Exception):
    """There is no complete answer; the message is one line saying why."""


class Client:
    """A server's address and API key, if it wants one; every failure is a ChatError."""

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url
        self.session = requests.Session()
        # Ignore http_proxy: a proxy cannot reach a server on this machine.
        self.session.trust_env = False
        if key:
            self.session.headers["Authorization"] = f"Bearer {key}".encode()

    def ask(self, prompt: str, history: list[dict[str, str]]) -> str:
        """Return the whole answer to `prompt`."""
        response = self._post({"prompt": prompt, "history": history})
        try:
            return response.json()["response"]
        except (ValueError, LookupError, TypeError):
            raise ChatError(f"{self.url} is not the chat server") from None

    def ask_and_print(self, prompt: str, history: list[dict[str, str]]) -> str:
        """Print the answer piece by piece as it is made, then return all of it."""
        body = {"prompt": prompt, "history": history, "stream": True}
        response = self._post(body)
        try:
            for line in response.iter_lines():  # bytes, which are UTF-8
                if not line.startswith(b"data:"):
                    continue  # an empty line, a ping or an event's name
                event = json.loads(line.removeprefix(b"data:"))
                if "detail" in event:
                    raise ChatError(one_line(event["detail"]))
                if "response" in event:
                    return event["response"]
                print(event["delta"], end="", flush=True)
        except (requests.RequestException, ValueError, LookupError, TypeError):
            pass  # cut off, perhaps in the middle of a line, or no event of ours
        finally:
            response.close()
            print(flush=True)
        raise ChatError("the answer broke off before its end")

    def _post(self, body: dict[str, object]) -> requests.Response:
        streamed = "stream" in body
        try:
            response = self.session.post(
                self.url, json=body, stream=streamed, timeout=TIMEOUT
            )
        except requests.RequestException:
            reason = "is the address right and the server running?"
            raise ChatError(f"no answer from {self.url}: {reason}") from None
        if response.ok:
            return response
        try:
            reason = one_line(response.json()["detail"])
        except (requests.RequestException, LookupError, TypeError):
            reason = response.reason
        raise ChatError(f"{response.status_code}: {reason}")


def one_line(detail: str | list[dict]) -> str:
    """Return the server's `detail`, a text or a list of wrong fields, as one line."""
    if isinstance(detail, list):
        detail = "; ".join(
            f"{'.'.join(map(str, field['loc']))}: {field['msg']}" for field in detail
        )
    return " ".join(str(detail).split())


def chat(client: Client) -> None:
    """Answer each line of stdin, as one conversation, until Ctrl-D."""
    mark = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    history: list[dict[str, str]] = []
    with contextlib.suppress(EOFError):
        while True:
            prompt = input(mark)
            if not prompt.strip():
                continue
            try:
                answer = client.ask_and_print(prompt, history)
            except ChatError as error:
                print(f"error: {error}", file=sys.stderr)
            else:
                history.append({"role": "user", "content": prompt})
                history.append({"role": "assistant", "content": answer})
    if mark:
        print()  # the shell's prompt shall not follow this one


def main() -> None:
    """Read the command line, then ask once or chat."""
    parser = argparse.ArgumentParser(description="Talk to the chat server.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("question", nargs="?", help="left out: the tutorial's example")
    what.add_argument("--chat", action="store_true", help="questions from stdin")
    url = "http://127.0.0.1:6006/"
    parser.add_argument("--url", default=url, help="default: %(default)s")
    parser.add_argument("--key", help="API key (default: PHI4_API_KEY, if just one)")
    options = parser.parse_args()
    keys = os.environ.get("PHI4_API_KEY", "").replace(",", " ").split()
    client = Client(options.url, options.key or (keys[0] if len(keys) == 1 else None))
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        if options.chat:
            chat(client)
        elif options.question is None:
            print(client.ask(EXAMPLE_PROMPT, EXAMPLE_HISTORY), flush=True)
        else:
            print(client.ask(options.question, []), flush=True)
    except ChatError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # such as `python py_api.py | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
