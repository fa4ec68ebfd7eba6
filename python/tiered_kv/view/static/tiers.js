// The tiers from the nearest to the farthest, how full they are, and what moves between them now.

import { TIERS, tierName } from "./palette.js";
import { bytes, fitted, short } from "./words.js";

const svg = d3.select("#tiers svg");
const ROW = 34;

export function drawTiers(snapshot, edges) {
  const { width, height } = svg.node().getBoundingClientRect();
  const { tiers } = snapshot;
  const gap = Math.max(22, Math.min(48, (height - ROW * tiers.length) / Math.max(1, tiers.length - 1)));
  const rows = svg
    .selectAll("g.tier")
    .data(tiers, (d) => d.tier)
    .join((enter) => {
      const group = enter.append("g").attr("class", "tier");
      group.append("text").attr("class", "name").attr("y", 13).style("font-weight", 600);
      group.append("text").attr("class", "held").attr("y", 13).attr("text-anchor", "end");
      for (const part of ["room", "held-bar", "pinned-bar"]) {
        group.append("rect").attr("class", part).attr("y", 19).attr("height", 11).attr("rx", 2);
      }
      return group;
    })
    .attr("transform", (_, i) => `translate(0,${i * (ROW + gap)})`);
  const part = (n, d) => (d.capacity_tokens ? Math.min(1, n / d.capacity_tokens) * width : 0);
  rows.select(".name").text((d) => tierName(d.tier));
  rows.select(".held").attr("x", width).attr("class", (d) => `held ${d.state ? "late" : "quiet"}`).text(held);
  rows.select(".room").attr("width", width).attr("fill", "none").attr("class", "room axis");
  rows.select(".held-bar").attr("width", (d) => part(d.resident_tokens, d)).attr("fill", (d) => TIERS[d.tier].colour).attr("fill-opacity", 0.55);
  rows.select(".pinned-bar").attr("width", (d) => part(d.pinned_tokens, d)).attr("fill", (d) => TIERS[d.tier].colour);
  drawEdges(tiers, edges, width, gap);
}

function held(d) {
  if (d.state) return d.state;
  if (!d.capacity_tokens) return `${short(d.resident_tokens)} tokens known to be there`;
  const share = d.capacity_tokens ? Math.round((100 * d.resident_tokens) / d.capacity_tokens) : 0;
  const pinned = d.pinned_tokens ? `, ${short(d.pinned_tokens)} in use` : "";
  return `${short(d.resident_tokens)} of ${short(d.capacity_tokens)} tokens, ${share}%${pinned}`;
}

function drawEdges(tiers, edges, width, gap) {
  const order = tiers.map((t) => t.tier);
  const placed = edges.map((edge) => {
    const from = order.indexOf(edge.source);
    const to = order.indexOf(edge.target);
    return { ...edge, isDown: to > from, at: Math.max(from, to) };
  });
  const groups = svg
    .selectAll("g.edge")
    .data(placed.filter((d) => d.at > 0), (d) => `${d.source} ${d.target}`)
    .join((enter) => {
      const group = enter.append("g").attr("class", "edge");
      group.append("path").attr("class", "flow");
      group.append("path").attr("class", "head");
      group.append("text").attr("class", "rate");
      return group;
    })
    .attr("transform", (d) => `translate(${d.isDown ? 0 : width / 2},${d.at * (ROW + gap) - gap})`)
    .attr("data-edge", (d) => `${d.source}-${d.target}`);
  const isMoving = (d) => d.bytes_per_s > 0 || d.queued_bytes > 0;
  const colour = (d) => (isMoving(d) ? TIERS[d.source].colour : "var(--line)");
  const [top, bottom] = [3, gap - 3];
  groups.select(".flow")
    .attr("class", (d) => `flow${isMoving(d) ? " moving" : ""}`)
    .attr("stroke", colour)
    .attr("d", (d) => (d.isDown ? `M10,${top}V${bottom}` : `M10,${bottom}V${top}`))
    .style("animation-duration", (d) => `${Math.max(0.15, 1.2 - Math.log10(1 + d.bytes_per_s / 1e5) * 0.25)}s`);
  groups.select(".head").attr("fill", colour)
    .attr("d", (d) => (d.isDown ? `M5,${bottom - 5}h10l-5,6z` : `M5,${top + 5}h10l-5,-6z`));
  groups.select(".rate").attr("x", 20).attr("y", gap / 2 + 4)
    .attr("class", (d) => `rate ${isMoving(d) ? "" : "quiet"}`)
    .text((d) => fitted(rate(d), width / 2 - 22));
}

function rate(d) {
  const what = d.isDown ? "written" : "loaded";
  if (d.bytes_per_s > 0) return `${bytes(d.bytes_per_s)}/s${d.queued_bytes ? `, ${bytes(d.queued_bytes)} to go` : ""}`;
  if (d.queued_bytes > 0) return `${bytes(d.queued_bytes)} to go`;
  return d.moved_bytes ? `idle, ${bytes(d.moved_bytes)} ${what}` : "idle";
}
