// The page: one drawing at a time, from the form through the jobs API into the tray.

import { Api, ApiError } from "./api.js";
import { Controls } from "./controls.js";
import { curl, python } from "./snippets.js";
import { Tray, drawing } from "./tray.js";

const element = (id) => document.getElementById(id);
const SNIPPETS = { curl, python };
const THEMES = ["auto", "light", "dark"];
const NOT_READY_POLL_MS = 2000;

const api = new Api();
const controls = new Controls(() => showCode());
const tray = new Tray(recall, startFrom);
let language = "curl";
/** What cancels the drawing that runs; null between two. */
let running = null;
/** The key that was given last: Enter and leaving the field both mean it, once. */
let tried = "";

async function draw(seed) {
  if (running) return;
  const problem = controls.problem();
  complain(problem?.[1], problem?.[0]);
  if (problem) return;
  const request = controls.request();
  // Drawn here, so that the seed is known from the start and the code on the page repeats it.
  request.seed = seed ?? request.seed ?? crypto.getRandomValues(new Uint32Array(1))[0];
  running = new AbortController();
  tray.show(drawing(request));
  tray.waiting("asking…");
  showCode(request);
  busy(true);
  element("pictures").scrollIntoView({ block: "nearest" });
  const began = performance.now();
  try {
    await follow(api.draw(request, running.signal), request);
    announce(`Finished: ${request.prompt}`);
  } catch (error) {
    stopped(error);
  } finally {
    running = null;
    busy(false);
    tray.close((performance.now() - began) / 1000);
  }
}

/** Pass every event of a drawing on to the tray. */
async function follow(events, request) {
  let announced = 0;
  for await (const event of events) {
    if (event.kind === "queued") tray.waiting(`number ${event.position} in the queue`);
    else if (event.kind === "step") {
      tray.step(event.index, event.step, event.steps, event.preview);
      // Three words a picture are company; twenty are noise to whoever listens.
      const third = Math.floor((3 * event.step) / event.steps);
      if (event.index === 0 && third > announced && third < 3) {
        announced = third;
        announce(`Step ${event.step} of ${event.steps}`);
      }
    } else if (event.kind === "picture") tray.finish(event.index, event.src, event.blob, event.facts);
  }
  if (tray.shown.pictures.some(({ src }) => !src))
    throw new ApiError({ message: `Not every one of ${request.n} pictures came back.` });
}

function stopped(error) {
  const cancelled = running.signal.aborted;
  const message = cancelled ? "cancelled" : error.message;
  tray.shown.pictures.forEach((_, i) => tray.fail(i, cancelled ? message : "not drawn"));
  if (cancelled) return announce("Cancelled");
  if (error.status === 401) return askForKey(message);
  const wait = error.retryAfterS ? ` Try again in ${error.retryAfterS} s.` : "";
  return complain(`${message}${wait}`, error.param);
}

/** Show what is wrong, and at which field; nothing takes the message away. */
function complain(message, field) {
  element("alert").hidden = !message;
  element("alert").textContent = message ?? "";
  controls.mark(field);
}

function askForKey(message) {
  complain(message);
  element("key-field").hidden = false;
  element("key").focus();
}

function useKey() {
  const key = element("key").value.trim();
  if (key === "" || key === tried) return;
  tried = key;
  api.key = key;
  complain();
  connect();
}

function announce(text) {
  element("announce").textContent = text;
}

function busy(is) {
  // Not `disabled`: whoever pressed it keeps the focus.
  element("draw").setAttribute("aria-disabled", String(is));
  element("draw").textContent = is ? "Drawing…" : "Draw";
  if (!is && document.activeElement === element("cancel")) element("draw").focus();
  for (const id of ["again-new", "again-same"]) element(id).disabled = is;
}

/** Bring back a drawing of this tab, with its settings. */
function recall(it) {
  if (running) return;
  tray.show(it);
  tray.summary();
  controls.restore(it.request);
  complain();
  showCode(it.request);
}

/** Begin the next drawing at a picture. */
function startFrom(picture) {
  controls.startFrom(picture);
  element("settings").open = true;
  element("strength").focus();
  announce("The next picture starts from this one");
  showCode();
}

function showCode(request = controls.request()) {
  element("code-text").textContent = SNIPPETS[language](request, location.origin, api.hasKey);
}

function choose(tab) {
  language = tab.id.replace("tab-", "");
  for (const other of document.querySelectorAll("[role=tab]")) {
    other.setAttribute("aria-selected", String(other === tab));
    other.tabIndex = other === tab ? 0 : -1;
  }
  element("code").setAttribute("aria-labelledby", tab.id);
  showCode(running || tray.shown ? tray.shown.request : undefined);
}

async function copy() {
  const button = element("copy");
  try {
    await navigator.clipboard.writeText(element("code-text").textContent);
    button.textContent = "Copied";
  } catch {
    // No clipboard (plain HTTP from another machine): select it for Ctrl C.
    getSelection().selectAllChildren(element("code-text"));
    button.textContent = "Selected";
  }
  announce(`${button.textContent}: the ${language} code`);
  setTimeout(() => (button.textContent = "Copy"), 2000);
}

function theme(step) {
  let now = document.documentElement.dataset.theme ?? "auto";
  if (step) {
    now = THEMES[(THEMES.indexOf(now) + 1) % THEMES.length];
    if (now === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = now;
    try {
      localStorage.setItem("darkroom-theme", now);
    } catch {
      // Storage is blocked: the choice lasts as long as the page.
    }
  }
  element("theme").textContent = `Theme: ${now}`;
}

function server(state, text) {
  element("server").dataset.state = state;
  element("server-text").textContent = text;
}

/** Ask what there is; again until the server is ready, or a key is given. */
async function connect() {
  try {
    const { models, solvers } = await api.offer();
    controls.offer(models, solvers);
    showCode();
    if (!element("key-field").hidden) element("prompt").focus();
    element("key-field").hidden = true;
    const ready = await api.ready();
    const { id, precision, backend } = models[0];
    server(ready ? "ready" : "starting", ready ? `Ready: ${id}, ${precision} on ${backend}` : "Warming up…");
    if (ready) return;
  } catch (error) {
    if (error.status === 401) {
      server("down", "Needs an API key");
      return askForKey(error.message);
    }
    server("down", "Not reachable");
  }
  setTimeout(connect, NOT_READY_POLL_MS);
}

element("form").addEventListener("submit", (event) => {
  event.preventDefault();
  draw();
});
element("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  draw();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
element("cancel").addEventListener("click", () => running?.abort());
element("examples").addEventListener("click", ({ target }) => {
  if (target.tagName !== "BUTTON" || running) return;
  element("prompt").value = target.textContent;
  draw();
});
element("again-new").addEventListener("click", () => {
  element("seed").value = "";
  draw();
});
element("again-same").addEventListener("click", () => draw(tray.shown.request.seed));
element("key").addEventListener("change", useKey);
element("key").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  useKey();
});
for (const tab of document.querySelectorAll("[role=tab]")) {
  tab.addEventListener("click", () => choose(tab));
  tab.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const other = tab.nextElementSibling ?? tab.previousElementSibling;
    other.focus();
    choose(other);
  });
}
for (const name of ["dragover", "dragleave", "drop"]) {
  element("tray").addEventListener(name, (event) => {
    event.preventDefault();
    element("tray").classList.toggle("dropping", name === "dragover");
    const [file] = event.dataTransfer.files;
    if (name === "drop" && file) startFrom(file);
  });
}
element("copy").addEventListener("click", copy);
element("theme").addEventListener("click", () => theme(true));

theme(false);
// Ready to be typed over, except where the focus would open a keyboard over half of the page.
if (matchMedia("(hover: hover)").matches) element("prompt").focus();
connect().then(() => document.activeElement === element("prompt") && element("prompt").select());
