# SPDX-License-Identifier: MIT
"""Look at /docs in a real browser and try the first route there.

    npm install playwright-core
    python tests/measure/docs_page.py NODE_MODULES BROWSER [SCREENSHOT.png]

Presses "Try it out" and "Execute" on POST /, and fails unless the page shows a 200 and
has loaded nothing from elsewhere. BROWSER is the path of Chromium (Debian:
chromium-headless-shell).
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import _setup  # noqa: F401
import tiny
from server import running

VISIT = """
const {chromium} = require("playwright-core");
(async () => {
  const [page_url, browser, shot] = process.argv.slice(2);
  const chrome = await chromium.launch({executablePath: browser, args: ["--no-sandbox"]});
  const page = await chrome.newPage({viewport: {width: 1100, height: 1700}});
  const problems = [];
  page.on("pageerror", error => problems.push(String(error)));
  page.on("console", line => line.type() === "error" && problems.push(line.text()));
  page.on("requestfailed", request => problems.push("failed: " + request.url()));
  page.on("request", request => {
    if (!["127.0.0.1", ""].includes(new URL(request.url()).hostname))
      problems.push("outside: " + request.url());
  });
  await page.goto(page_url);
  const route = page.locator(".opblock-post").first();
  await route.click();
  await page.screenshot({path: shot.replace(/\\.png$/, "-before.png"), fullPage: true});
  await route.getByRole("button", {name: "Try it out"}).click();
  console.log("sent:", await route.locator("textarea").first().inputValue());
  await route.getByRole("button", {name: "Execute"}).click();
  const status = route.locator(".live-responses-table .response-col_status").nth(1);
  await status.waitFor();
  console.log("status:", (await status.innerText()).trim());
  console.log("answer:", await route.locator(".live-responses-table pre").first().innerText());
  await page.screenshot({path: shot, fullPage: true});
  problems.forEach(problem => console.log("problem:", problem));
  await chrome.close();
  process.exit(problems.length ? 1 : 0);
})().catch(error => { console.error(error); process.exit(1); });
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("node_modules", type=Path)
    parser.add_argument("browser", help="path of Chromium")
    parser.add_argument("screenshot", type=Path, nargs="?", default=Path("docs.png"))
    options = parser.parse_args()
    modules, shot = options.node_modules.resolve(), str(options.screenshot.resolve())
    with tempfile.TemporaryDirectory() as scratch:
        tiny.tiny_model(Path(scratch), context=2048)
        script = Path(scratch) / "visit.cjs"
        script.write_text(VISIT)
        with running(model=Path(scratch), served_model_name="phi-4") as served:
            command = ["node", str(script), f"{served.url}/docs", options.browser, shot]
            environment = os.environ | {"NODE_PATH": str(modules)}
            visit = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, text=True, check=False
            )
    print(visit.stdout)
    return 0 if visit.returncode == 0 and "status: 200" in visit.stdout else 1


if __name__ == "__main__":
    sys.exit(main())
