// Where the prompt tokens of finished requests came from, over the last five minutes.

import { COMPUTED, TIERS } from "./palette.js";
import { short, showEmpty, swatch } from "./words.js";

const svg = d3.select("#history svg");
const SPAN_S = 300;
const BIN_S = 5;
const SOURCES = [
  ["device", TIERS.device],
  ["host", TIERS.host],
  ["disk", TIERS.disk],
  ["store", TIERS.store],
  ["computed", COMPUTED],
];
let points = [];

export function begin(history) {
  points = history;
}

export function add(point) {
  points.push(point);
  while (points.length && points[0].at_s < point.at_s - SPAN_S - BIN_S) points.shift();
}

export function drawHistory() {
  const { width, height } = svg.node().getBoundingClientRect();
  const now = points.at(-1)?.at_s ?? 0;
  const bins = d3.rollup(points, sums, (p) => Math.floor(p.at_s / BIN_S));
  const total = (bin) => d3.sum(SOURCES, ([name]) => bin[name]);
  const most = d3.max(bins.values(), total) ?? 0;
  showEmpty("#history", most ? "" : "No request has finished in the last five minutes.");
  const x = d3.scaleLinear().domain([now - SPAN_S, now]).range([0, width]);
  const y = d3.scaleLinear().domain([0, most || 1]).range([height - 14, 12]);
  const bars = [];
  for (const [at, bin] of bins) {
    let low = 0;
    for (const [name, { colour }] of SOURCES) {
      if (bin[name] && (at + 1) * BIN_S > now - SPAN_S) bars.push({ key: `${at} ${name}`, at, low, high: low + bin[name], colour });
      low += bin[name];
    }
  }
  const wide = Math.max(2, x(BIN_S) - x(0) - 1);
  svg.selectAll("rect").data(bars, (d) => d.key).join("rect")
    .attr("x", (d) => x(d.at * BIN_S)).attr("width", wide)
    .attr("y", (d) => y(d.high)).attr("height", (d) => y(d.low) - y(d.high)).attr("fill", (d) => d.colour);
  const labels = most ? [["start", 0, height - 2, "5 min ago"], ["end", width, height - 2, "now"], ["start", 0, 9, `${short(most)} in ${BIN_S} s`]] : [];
  svg.selectAll("text").data(labels).join("text").attr("class", "quiet")
    .attr("text-anchor", (d) => d[0]).attr("x", (d) => d[1]).attr("y", (d) => d[2]).text((d) => d[3]);
  const named = SOURCES.filter(([name]) => name !== "store" || points.some((p) => p.store));
  d3.select("#history .key").node().replaceChildren(...named.map(([name, { colour }]) => swatch(colour, name)));
}

function sums(some) {
  return Object.fromEntries(SOURCES.map(([name]) => [name, d3.sum(some, (p) => p[name])]));
}
