// The prefixes as an icicle: to the right of a prefix is what goes on from it, and a prefix is as high
// as the tokens it holds together with those. What the snapshot leaves out is drawn as "others".

import { paint } from "./paint.js";
import { TIERS, textOn } from "./palette.js";
import { ago, count, fitted, short, showEmpty, tipOn } from "./words.js";

const TREE_WIDTH = 74;
const COLUMN_MIN = 128;
const SQUARE = 10;
const TWO_LINES = 32;
const svg = d3.select("#picture svg");
const reduced = window.matchMedia("(prefers-reduced-motion: reduce)");

// What is looked at: the prefix in front (null: all), the one opened, the one the keyboard is at.
const look = { front: null, opened: null, at: null };
let drawn = new Map();
let last = null;
let tell = () => {};

export const opened = () => look.opened;

export function onOpen(callback) {
  tell = callback;
}

export function forget() {
  Object.assign(look, { front: null, opened: null, at: null });
}

export function drawForest(snapshot, mode) {
  last = { snapshot, mode };
  const { forest } = snapshot;
  const rest = forest.rest.count > 0 ? `, ${count(forest.prefixes.length)} largest shown` : "";
  document.getElementById("forest-counts").textContent =
    `${count(forest.count)} in all, ${short(forest.tokens)} tokens${rest}`;
  showEmpty("#forest", forest.count ? "" : "Nothing is cached yet. Send a request, and its prompt appears here.");
  const cells = layOut(forest);
  const { fill, legend } = paint(snapshot, mode);
  drawCells(cells, fill);
  drawLegend(legend);
  drawCrumbs(forest);
}

// -- where everything goes ------------------------------------------------------------------------

function asTree(forest) {
  const made = new Map();
  for (const tree of forest.trees) made.set(tree.id, { id: tree.id, tree, own: 0, size: tree.tokens, children: [] });
  for (const prefix of forest.prefixes) {
    const own = prefix.tokens;
    const item = { id: prefix.id, prefix, own, size: prefix.tokens_with_below, children: [] };
    made.set(prefix.id, item);
    made.get(prefix.parent)?.children.push(item);
  }
  for (const item of made.values()) addOthers(item);
  const all = { id: 0, own: 0, size: forest.tokens, children: forest.trees.map((tree) => made.get(tree.id)) };
  addOthers(all);
  return { all, made };
}

function addOthers(item) {
  const others = item.size - item.own - d3.sum(item.children, (child) => child.size);
  if (others > 0) item.children.push({ id: `others of ${item.id}`, others, own: others, size: others, children: [] });
}

function layOut(forest) {
  const { width, height } = svg.node().getBoundingClientRect();
  const { all, made } = asTree(forest);
  if (look.front !== null && !made.has(look.front)) look.front = null;
  const isWhole = look.front === null;
  const root = d3.hierarchy(isWhole ? all : made.get(look.front)).sum((d) => d.own);
  // In the order in which they came: what grows must not change places.
  root.sort((a, b) => (a.data.others ? 1 : 0) - (b.data.others ? 1 : 0) || a.data.id - b.data.id);
  d3.partition().size([height, 1])(root);
  const hasTrees = isWhole && root.children?.length > 1;
  const skipped = isWhole ? (hasTrees ? 1 : 2) : 0;
  const left = hasTrees ? TREE_WIDTH : 0;
  const columns = Math.max(1, Math.min(root.height - skipped + (hasTrees ? 0 : 1), Math.floor((width - left) / COLUMN_MIN)));
  const column = (width - left) / columns;
  const cells = [];
  for (const node of root.descendants()) {
    const at = node.depth - skipped - (hasTrees ? 1 : 0);
    const isTree = hasTrees && node.depth === 1;
    if ((at < 0 && !isTree) || at >= columns || node.x1 - node.x0 < 1) continue;
    cells.push({
      ...node.data,
      up: node.parent?.data.id,
      depth: node.depth,
      x: isTree ? 0 : left + at * column,
      y: node.x0,
      width: isTree && !node.data.others ? TREE_WIDTH : column,
      height: node.x1 - node.x0,
      goesOn: at === columns - 1 && node.data.children.length > 0,
    });
  }
  return cells;
}

// -- drawing --------------------------------------------------------------------------------------

function drawCells(cells, fill) {
  drawn = new Map(cells.filter((c) => c.prefix).map((c) => [c.id, c]));
  if (!drawn.has(look.at)) look.at = drawn.has(look.opened) ? look.opened : (drawn.keys().next().value ?? null);
  const groups = svg
    .selectAll("g.cell")
    .data(cells, (d) => d.id)
    .join((enter) => {
      const group = enter.append("g").attr("transform", place);
      group.append("rect").attr("class", "body").attr("rx", 2);
      group.append("text").attr("class", "name").attr("x", 6);
      group.append("text").attr("class", "more").attr("x", 6);
      group.append("g").attr("class", "where");
      return group;
    })
    .attr("class", (d) => `cell${d.prefix ? "" : " rest"}`)
    .attr("role", (d) => (d.prefix ? "treeitem" : "presentation"))
    .attr("aria-level", (d) => d.depth)
    .attr("aria-label", describe)
    .attr("aria-selected", (d) => d.prefix && d.id === look.opened)
    .attr("tabindex", (d) => (d.prefix ? (d.id === look.at ? 0 : -1) : null))
    .attr("data-name", (d) => d.prefix?.name ?? null)
    .on("click", (_, d) => d.prefix && open(d.id))
    .on("dblclick", (_, d) => d.prefix && d.children.length && bringToFront(d.id));
  tipOn(groups, describe);
  const moved = reduced.matches ? groups : groups.transition().duration(350);
  moved.attr("transform", place);
  groups.each(function draw(d) {
    drawCell(d3.select(this), d, d.prefix ? fill(d.prefix) : null);
  });
}

const place = (d) => `translate(${d.x},${d.y})`;

function drawCell(group, d, colour) {
  const width = Math.max(1, d.width - 2);
  const height = Math.max(1, d.height - (d.height > 6 ? 1 : 0));
  const ink = colour === null ? null : textOn(colour);
  group.style("fill", ink);
  group.select("rect.body").attr("width", width).attr("height", height).attr("fill", colour);
  const size = d.height >= 14 ? 11 : 9;
  const hasLabel = d.height >= 10.5;
  const hasSquares = Boolean(d.prefix) && hasLabel && width >= 100;
  const room = width - 10 - (hasSquares ? SQUARE * Object.keys(d.prefix.tiers).length + 6 : 0) - (d.goesOn ? 12 : 0);
  const [name, more] = labels(d);
  const weight = d.prefix ? 600 : 400;
  const middle = d.height >= TWO_LINES ? d.height / 2 - 3 : d.height / 2 + size / 3;
  group.select(".name").attr("y", middle).text(hasLabel ? fitted(name, room, `${weight} ${size}px`) : "")
    .style("font-size", `${size}px`).style("font-weight", weight);
  group.select(".more").attr("y", middle + 14).text(d.height >= TWO_LINES ? fitted(more, room) : "");
  drawSquares(group.select(".where"), d, hasSquares, width);
}

// A square for each tier: full where the prefix lies, half where it is on its way.
function drawSquares(group, d, isShown, width) {
  const tiers = isShown ? Object.entries(d.prefix.tiers) : [];
  const left = width - SQUARE * tiers.length - (d.goesOn ? 14 : 3);
  // On a ground of their own: a prefix may have the colour of a tier.
  group.selectAll("rect.ground").data(isShown ? [0] : []).join((enter) => enter.insert("rect", ":first-child"))
    .attr("class", "ground").attr("rx", 2).attr("x", left - 2).attr("y", d.height / 2 - 5.5)
    .attr("width", SQUARE * tiers.length + 1).attr("height", 11);
  group
    .selectAll("rect.tier")
    .data(tiers)
    .join("rect")
    .attr("class", "tier")
    .attr("x", (_, i) => left + SQUARE * i)
    .attr("y", d.height / 2 - 3.5)
    .attr("width", ([, state]) => (state === "absent" || state === "resident" ? 7 : 3.5))
    .attr("height", 7)
    .attr("fill", ([tier, state]) => (state === "absent" ? "none" : TIERS[tier].colour))
    .attr("stroke", ([tier, state]) => (state === "absent" ? "var(--none)" : TIERS[tier].colour));
  group.selectAll("text").data(isShown && d.goesOn ? [0] : []).join("text")
    .attr("x", width - 11).attr("y", d.height / 2 + 4).text("›");
}

function labels(d) {
  if (d.others) return [`others: ${short(d.others)} tokens`, ""];
  if (d.tree) return [d.tree.salted ? `salt ${d.tree.name}` : `tree ${d.tree.name}`, `${short(d.tree.tokens)} tokens`];
  const { name, text, tokens, tokens_with_below: below } = d.prefix;
  const title = text ? text.replace(/\s+/g, " ") : name;
  if (d.height < TWO_LINES) return [`${title} · ${short(tokens)}`, ""];
  return [title, below > tokens ? `${short(tokens)} + ${short(below - tokens)} below` : `${short(tokens)} tokens`];
}

function describe(d) {
  if (d.others) return `Others, too small to be shown: ${count(d.others)} tokens`;
  if (d.tree) {
    const kind = d.tree.salted ? "Tree with a salt or key of its own" : "Tree shared by all";
    return `${kind}${d.tree.adapter ? ", of an adapter" : ""}: ${count(d.tree.tokens)} tokens`;
  }
  const { name, tokens, users, tiers, last_use_s: used } = d.prefix;
  const where = Object.keys(tiers).filter((tier) => tiers[tier] === "resident").map((tier) => TIERS[tier].name);
  return `Prefix ${name}: ${count(tokens)} tokens, on ${where.join(", ") || "no tier"}, ` +
    `${users} in use, used ${ago(used)}`;
}

function drawLegend(items) {
  d3.select("#legend").selectAll("span.item").data(items).join("span").attr("class", "item").each(function draw(d) {
    const box = document.createElement("span");
    box.className = "swatch";
    box.style.background = d.colour;
    this.replaceChildren(box, d.name);
  });
}

function drawCrumbs(forest) {
  const crumbs = document.getElementById("crumbs");
  crumbs.replaceChildren();
  if (look.front === null) return;
  const byId = new Map(forest.prefixes.map((p) => [p.id, p]));
  const all = document.createElement("button");
  all.type = "button";
  all.textContent = "All prefixes";
  all.addEventListener("click", () => bringToFront(null));
  crumbs.append(all, ` › ${byId.get(look.front)?.name ?? ""}`);
}

// -- what one does with it ------------------------------------------------------------------------

function redraw() {
  if (last) drawForest(last.snapshot, last.mode);
}

function open(id) {
  look.opened = look.at = id;
  redraw();
  tell();
}

function bringToFront(id) {
  look.front = id;
  redraw();
}

function moveTo(id) {
  if (id === undefined || !drawn.has(id)) return;
  look.at = id;
  redraw();
  svg.selectAll("g.cell").filter((d) => d.id === id).node()?.focus();
}

function siblings(cell) {
  return [...drawn.values()].filter((c) => c.x === cell.x).sort((a, b) => a.y - b.y);
}

function keyed(event) {
  const cell = drawn.get(look.at);
  if (!cell) return;
  const column = siblings(cell);
  const at = column.indexOf(cell);
  const steps = {
    ArrowDown: () => moveTo(column[at + 1]?.id),
    ArrowUp: () => moveTo(column[at - 1]?.id),
    ArrowLeft: () => moveTo(cell.up),
    ArrowRight: () => moveTo([...drawn.values()].find((c) => c.up === cell.id)?.id),
    Home: () => moveTo(column[0].id),
    End: () => moveTo(column.at(-1).id),
    Enter: () => open(cell.id),
    " ": () => open(cell.id),
    "+": () => cell.children.length && bringToFront(cell.id),
    "-": () => bringToFront(null),
    Escape: () => bringToFront(null),
  };
  if (event.key in steps) {
    event.preventDefault();
    steps[event.key]();
  }
}

svg.on("keydown", keyed);
new ResizeObserver(redraw).observe(document.getElementById("picture"));
