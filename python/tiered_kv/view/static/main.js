// Takes what the page's server sends, keeps the page honest about how old it is, and draws it.

import { drawDetails } from "./details.js";
import { drawForest, forget, onOpen, opened } from "./forest.js";
import * as history from "./history.js";
import { forgetGroups } from "./paint.js";
import { drawLanes, drawQueue } from "./requests.js";
import { drawTiers } from "./tiers.js";
import { count, seconds } from "./words.js";

let about = { kind: "live", name: "", history: [] };
let frame = null;
let lastFrameAt = performance.now();
let lostSince = null;

// -- light and dark -------------------------------------------------------------------------------

const button = document.getElementById("theme");
const system = window.matchMedia("(prefers-color-scheme: dark)");

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  button.textContent = theme === "dark" ? "Light" : "Dark";
}

setTheme(localStorage.getItem("theme") ?? (system.matches ? "dark" : "light"));
button.addEventListener("click", () => {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  localStorage.setItem("theme", theme);
  setTheme(theme);
  draw();
});

// -- drawing --------------------------------------------------------------------------------------

const mode = () => document.querySelector("input[name=colour]:checked").value;

function draw() {
  const snapshot = frame?.snapshot;
  if (!snapshot) return;
  drawForest(snapshot, mode());
  drawTiers(snapshot, frame.edges.length ? frame.edges : snapshot.edges.map((e) => ({ ...e, bytes_per_s: 0, queued_bytes: 0 })));
  drawDetails(snapshot, opened());
  drawQueue(snapshot);
  drawLanes(snapshot);
  history.drawHistory();
  const cost = `${(snapshot.scheduler_us / 1000).toFixed(2)} ms`;
  document.getElementById("facts").textContent =
    `${snapshot.model ?? ""} · policy ${snapshot.policy} · pages of ${snapshot.page_tokens} tokens · ` +
    `${count(snapshot.hits.requests)} requests answered · this picture kept the scheduler for ${cost}`;
}

function showState() {
  let state = "connecting";
  let sentence = "";
  if (lostSince !== null) {
    state = "page lost";
    sentence = "The page's own server, python -m tiered_kv.view, does not answer; the page goes on trying.";
  } else if (frame?.state === "disconnected") {
    state = "disconnected";
    const since = seconds(Math.max(0, Date.now() / 1000 - frame.since_s));
    sentence = `Disconnected for ${since}: ${frame.sentence} The page goes on trying by itself.`;
  } else if (frame) {
    const silent = (performance.now() - lastFrameAt) / 1000;
    state = about.kind === "replay" ? "replay" : "live";
    if (about.kind === "live" && silent > 3 + 2 * (about.every_s ?? 1)) {
      sentence = `The last picture is ${seconds(silent)} old: the scheduler is busy with a long forward pass.`;
    }
  }
  const pill = document.getElementById("state");
  if (pill.dataset.state !== state) {
    pill.dataset.state = state;
    pill.textContent = state;
  }
  const banner = document.getElementById("banner");
  banner.hidden = !sentence;
  if (banner.textContent !== sentence) banner.textContent = sentence;
  document.body.classList.toggle("stale", state === "disconnected" || state === "page lost");
}

// -- what comes -----------------------------------------------------------------------------------

// Counters that go backwards: the server was restarted, and its prefixes have other numbers.
function isAnotherLife(before, now) {
  return Boolean(before && now && now.hits.requests < before.hits.requests);
}

function take(next) {
  if (isAnotherLife(frame?.snapshot, next.snapshot)) {
    forget();
    forgetGroups();
    history.begin([]);
  }
  frame = next;
  lastFrameAt = performance.now();
  lostSince = null;
  if (next.point) history.add(next.point);
  draw();
  showState();
}

async function connect() {
  const events = new EventSource("events");
  events.addEventListener("open", async () => {
    lostSince = null;
    const answer = await fetch("about");
    about = await answer.json();
    document.getElementById("source").textContent = about.kind === "replay" ? `recording ${about.name}` : about.name;
    history.begin(about.history);
    showState();
  });
  events.addEventListener("message", (event) => take(JSON.parse(event.data)));
  events.addEventListener("error", () => {
    lostSince ??= performance.now();
    showState();
  });
}

for (const input of document.querySelectorAll("input[name=colour]")) input.addEventListener("change", draw);
onOpen(() => frame?.snapshot && drawDetails(frame.snapshot, opened()));
window.addEventListener("resize", draw);
setInterval(showState, 1000);
connect();
