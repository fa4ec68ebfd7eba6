// Those who wait, by how much slack they have, and those who are under way.

import { gangColour } from "./paint.js";
import { count, element, seconds, short, showEmpty, tipOn } from "./words.js";

const svg = d3.select("#queue svg");
const STEP = 15;
const CHIP_WIDTH = 158;
const TICKS = [-3600, -600, -60, -10, -1, 0, 1, 10, 60, 600, 3600];

export const isLate = (row) => row.slack_s !== null && row.slack_s < 0;

export function describe(row) {
  const slack = row.slack_s === null ? "no deadline" : isLate(row) ? `${seconds(-row.slack_s)} late` : `${seconds(row.slack_s)} of slack`;
  return `${row.name.slice(0, 12)}, ${row.slo_class}${row.tenant ? `, ${row.tenant}` : ""}\n` +
    `prompt ${count(row.prompt_tokens)} tokens, ${count(row.cached_tokens)} of them cached, ${count(row.output_tokens)} produced\n` +
    `here for ${seconds(row.age_s)}, ${slack}`;
}

export function drawQueue(snapshot) {
  const { waiting } = snapshot.requests;
  const { rows } = waiting;
  document.getElementById("queue-counts").textContent = counts(waiting);
  showEmpty("#queue", waiting.count ? "" : "Nobody waits.");
  const { width, height } = svg.node().getBoundingClientRect();
  const timed = rows.filter((row) => row.slack_s !== null);
  const hasOthers = timed.length < rows.length;
  const right = width - (hasOthers ? 150 : 20);
  const [least, most] = [d3.min(timed, (d) => d.slack_s) ?? 0, d3.max(timed, (d) => d.slack_s) ?? 0];
  const x = d3.scaleSymlog().constant(1).domain([Math.min(-2, least), Math.max(10, most)]).range([16, right]);
  const base = height - 20;
  drawAxis(x, base, height, waiting.count > 0, hasOthers ? right : null, width);
  const dots = stacked(rows, (row) => (row.slack_s === null ? right + 30 : x(row.slack_s)), base, width);
  const marks = svg
    .selectAll("path.waiting")
    .data(dots, (d) => d.row.name)
    .join("path")
    .attr("class", "waiting")
    .attr("d", (d) => d3.symbol(isLate(d.row) ? d3.symbolTriangle : d3.symbolCircle, 95)())
    .attr("transform", (d) => `translate(${d.x},${d.y})`)
    .attr("fill", (d) => gangColour(d.row.gang))
    .attr("stroke", (d) => (isLate(d.row) ? "var(--late)" : "var(--quiet)"))
    .attr("stroke-width", (d) => (isLate(d.row) ? 2.5 : 1));
  tipOn(marks, (d) => describe(d.row));
  svg.attr("aria-label", `Those who wait, by their slack: ${counts(waiting)}`);
}

function counts({ count: n, held, in_time: inTime, rows }) {
  if (!n) return "";
  const parts = [`${count(n)} in all`];
  if (rows.length < n) parts.push(`${count(rows.length)} shown`);
  if (inTime !== null) parts.push(`${count(inTime)} can be in time`);
  if (held) parts.push(`${count(held)} wait for pages`);
  return parts.join(", ");
}

function drawAxis(x, base, height, isShown, border, width) {
  const [from, to] = x.domain();
  const ticks = isShown ? TICKS.filter((t) => t >= from && t <= to) : [];
  svg.selectAll("rect.late-zone").data(isShown ? [0] : []).join((enter) => enter.insert("rect", ":first-child"))
    .attr("class", "late-zone").attr("x", 0).attr("y", 0).attr("width", x(0)).attr("height", base);
  svg.selectAll("line.axis").data([...ticks.map(x), ...(border && isShown ? [border + 14] : [])]).join("line").attr("class", "axis")
    .attr("x1", (d) => d).attr("x2", (d) => d).attr("y1", 0).attr("y2", base);
  const labels = ticks.map((t) => ({ at: x(t), text: t === 0 ? "late | in time" : t < 0 ? `${seconds(-t)} late` : seconds(t), isLate: t < 0 }));
  if (border && isShown) labels.push({ at: Math.min(border + 62, width - 40), text: "no deadline", isLate: false });
  svg.selectAll("text.tick").data(apart(labels)).join("text")
    .attr("class", (d) => `tick ${d.isLate ? "late" : "quiet"}`).attr("text-anchor", "middle")
    .attr("x", (d) => d.at).attr("y", height - 6).text((d) => d.text);
}

// Labels that would overlap another one are left out, but never the one at zero.
function apart(labels) {
  const kept = labels.filter((label) => label.text.includes("|") || label.text.startsWith("no "));
  for (const label of labels) {
    const isFree = (other) => Math.abs(other.at - label.at) > (other.text.length + label.text.length) * 3.3 + 6;
    if (!kept.includes(label) && kept.every(isFree) && label.at > label.text.length * 3.3) kept.push(label);
  }
  return kept;
}

function stacked(rows, at, base, width) {
  const heights = new Map();
  const most = Math.max(1, Math.floor((base - 4) / STEP));
  return rows.map((row) => {
    let column = Math.max(1, Math.round(Math.min(at(row), width - 10) / STEP));
    // Where there is no room above the others, the next place to the right.
    while ((heights.get(column) ?? 0) >= most) column += 1;
    const n = heights.get(column) ?? 0;
    heights.set(column, n + 1);
    return { row, x: column * STEP, y: base - 9 - n * STEP };
  });
}

const LANES = [
  ["prefilling", "prefilling", "No prompt is being computed."],
  ["running", "decoding", "Nobody decodes."],
  ["parked", "parked", "Nobody is parked."],
];

export function drawLanes(snapshot) {
  const { requests } = snapshot;
  const body = document.getElementById("lanes-body");
  const fits = Math.max(1, Math.floor((body.getBoundingClientRect().width - 118 - 80) / CHIP_WIDTH));
  const children = [];
  for (const [kind, title, nobody] of LANES) {
    const { count: n, rows } = requests[kind];
    const lane = element("div", { class: "lane", "data-lane": kind });
    if (!n) lane.append(element("span", { class: "quiet" }, nobody));
    lane.append(...rows.slice(0, fits).map(chip));
    const more = n - Math.min(fits, rows.length);
    if (n && more > 0) lane.append(element("span", { class: "quiet" }, `+ ${count(more)} more`));
    children.push(element("div", { class: "kind" }, `${title} ${n ? count(n) : ""}`), lane);
  }
  body.replaceChildren(...children);
}

function chip(row) {
  const made = element("span", { class: `chip${isLate(row) ? " late" : ""}`, title: describe(row) },
    `${row.slo_class.slice(0, 11)} ${short(row.prompt_tokens)}+${row.output_tokens}`);
  made.style.borderLeftColor = gangColour(row.gang);
  return made;
}
