// One prefix: where it lies, when it is used, and by whom.

import { everyone, pathUp } from "./paint.js";
import { tierName } from "./palette.js";
import { ago, count, element, seconds } from "./words.js";

const body = document.getElementById("details-body");
const STATES = {
  resident: "here",
  loading: "on its way here",
  writing_back: "being written here",
  absent: "not here",
};
const LISTED = 40;

export function drawDetails(snapshot, id) {
  const title = document.getElementById("details-title");
  const byId = new Map(snapshot.forest.prefixes.map((p) => [p.id, p]));
  const prefix = byId.get(id);
  if (!prefix) {
    title.textContent = "Prefix";
    const sentence = id === null
      ? "Click a prefix, or move to one with the arrow keys and press Enter, to see where it lies and who uses it."
      : "This prefix is gone, or too small to be shown now.";
    body.replaceChildren(element("p", {}, sentence));
    return;
  }
  title.textContent = `Prefix ${prefix.name}`;
  const users = everyone(snapshot).filter((row) => pathUp(byId, row.prefix).some((at) => at.id === id));
  const scroll = body.scrollTop;
  body.replaceChildren(...(prefix.text ? [element("p", { class: "text" }, prefix.text)] : []), facts(prefix), ...usedBy(prefix, users));
  body.scrollTop = scroll;
}

function facts(prefix) {
  const start = prefix.end - prefix.tokens;
  const list = [
    ["tokens", `${count(prefix.tokens)} (${count(start)} to ${count(prefix.end)} of a prompt)`],
    ["with all below", `${count(prefix.tokens_with_below)} tokens`],
    ["pages", count(prefix.pages)],
    ...Object.entries(prefix.tiers).map(([tier, state]) => [`on ${tierName(tier)}`, STATES[state] ?? state]),
    ["matches", count(prefix.hits)],
    ["last use", ago(prefix.last_use_s)],
    ["next use", prefix.next_use_s === null ? "not foreseen" : nextUse(prefix.next_use_s)],
    ["in use by", prefix.users ? `${count(prefix.users)}, who keep it on the device` : "nobody who runs"],
  ];
  const made = element("dl");
  for (const [name, value] of list) made.append(element("dt", {}, name), element("dd", {}, value));
  return made;
}

const nextUse = (s) => (s <= 0 ? "expected now" : `expected in ${seconds(s)}`);

function usedBy(prefix, users) {
  if (!users.length) return [element("p", {}, "None of the requests that are shown goes on from it now.")];
  const table = element("table", {}, element("tr", {}, ...["request", "class", "tenant", "is", "slack"].map((h) => element("th", {}, h))));
  for (const row of users.slice(0, LISTED)) {
    const late = row.slack_s !== null && row.slack_s < 0;
    table.append(
      element("tr", {},
        element("td", { title: row.name }, row.name.slice(0, 8)),
        element("td", {}, row.slo_class),
        element("td", {}, row.tenant || "–"),
        element("td", {}, row.kind),
        element("td", { class: late ? "late" : "" }, row.slack_s === null ? "–" : late ? `${seconds(-row.slack_s)} late` : seconds(row.slack_s)),
      ),
    );
  }
  const more = users.length > LISTED ? [element("p", {}, `and ${users.length - LISTED} more`)] : [];
  return [element("h2", {}, "Used by"), table, ...more];
}
