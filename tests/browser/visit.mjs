// Opens pages in Chromium and carries out steps, [what, ...arguments] each, read as JSON from stdin:
// {"chromium": path, "visits": [{"url", "steps", "width"?, "dark"?}]}. Prints what every step gave, and what went wrong.
import { readFileSync } from "node:fs";
import { chromium } from "playwright-core";

const asked = JSON.parse(readFileSync(0, "utf-8"));
const browser = await chromium.launch({ executablePath: asked.chromium, args: ["--no-sandbox", "--disable-gpu"] });

// A change of the hash is told to the page a task later: until then it still says that it is ready.
const told = () => new Promise((done) => setTimeout(() => requestAnimationFrame(() => setTimeout(done, 20)), 20));
const settled = (page) => page.evaluate(told).then(() => page.waitForFunction(() => document.body.dataset.ready === "yes"));
const STEPS = {
  evaluate: (page, code) => page.evaluate(code),
  click: (page, selector) => page.click(selector),
  press: (page, key) => page.keyboard.press(key),
  fill: (page, selector, text) => page.locator(selector).fill(text).then(() => page.locator(selector).press("Enter")),
  choose: (page, selector, label) => page.selectOption(selector, { label }),
  hover: (page, selector, position) => page.hover(selector, { position }),
  hash: (page, hash) => page.evaluate((text) => { location.hash = text; }, hash),
  back: (page) => page.goBack(),
  shot: (page, path, full) => page.screenshot({ path, fullPage: full ?? true }).then(() => path),
  paper: (page) => page.emulateMedia({ media: "print" }),
  pdf: (page, path) => page.pdf({ path, format: "A4", printBackground: false }).then(() => path),
};

const results = [];
for (const { url, steps, width, dark } of asked.visits) {
  const context = await browser.newContext({ viewport: { width: width ?? 1280, height: 800 }, colorScheme: dark ? "dark" : "light" });
  const page = await context.newPage();
  const wrong = [], requests = [];
  page.on("console", (message) => { if (["error", "warning"].includes(message.type())) wrong.push(message.text()); });
  page.on("pageerror", (error) => wrong.push(String(error)));
  page.on("dialog", (dialog) => { wrong.push(`dialog: ${dialog.message()}`); dialog.dismiss(); });
  page.on("request", (request) => { if (!request.url().startsWith("data:")) requests.push(request.url()); });
  const given = [];
  await page.goto(url);
  await settled(page);
  for (const [what, ...arguments_] of steps) {
    const result = await STEPS[what](page, ...arguments_);
    await settled(page);
    given.push(what === "pdf" || result === undefined || result?.constructor?.name === "Response" ? null : result);
  }
  results.push({ given, wrong, requests });
  await context.close();
}
await browser.close();
console.log(JSON.stringify(results));
