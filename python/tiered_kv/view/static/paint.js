// What the colour of a prefix says: where it lies, which gang or tenant uses it, or how old it is.

import { ageColour, Groups, NOWHERE, SEVERAL, TIERS } from "./palette.js";
import { short } from "./words.js";

const gangs = new Groups();
const tenants = new Groups();
// Who used a prefix last, also when nobody does now.
const lastTenant = new Map();

export const gangColour = (gang) => (gang === null ? unused() : gangs.colour(gang));

export function unused() {
  return getComputedStyle(document.documentElement).getPropertyValue("--none").trim();
}

export function forgetGroups() {
  gangs.clear();
  tenants.clear();
  lastTenant.clear();
}

export const everyone = (snapshot) =>
  Object.entries(snapshot.requests).flatMap(([kind, { rows }]) => rows.map((row) => ({ ...row, kind })));

// Prefixes from `id` up to the tree.
export function pathUp(byId, id) {
  const path = [];
  for (let at = byId.get(id); at; at = byId.get(at.parent)) path.push(at);
  return path;
}

export function paint(snapshot, mode) {
  const byId = new Map(snapshot.forest.prefixes.map((p) => [p.id, p]));
  rememberTenants(snapshot, byId);
  return { tier: byTier, gang: byGang, tenant: byTenant, age: byAge }[mode](snapshot, byId);
}

function byTier(snapshot) {
  const held = Object.fromEntries(snapshot.tiers.map((t) => [t.tier, t.forest_tokens]));
  const legend = snapshot.tiers.map(({ tier }) => ({
    colour: TIERS[tier].colour,
    name: `nearest on ${TIERS[tier].name} (${short(held[tier])} tokens there)`,
  }));
  return {
    fill: ({ tiers }) => {
      const nearest = Object.keys(tiers).find((tier) => tiers[tier] === "resident");
      return nearest ? TIERS[nearest].colour : NOWHERE.colour;
    },
    legend: [...legend, NOWHERE],
  };
}

function byGang(snapshot, byId) {
  const gangOf = new Map();
  const members = new Map();
  for (const { gang, prefix } of everyone(snapshot)) {
    if (gang === null) continue;
    members.set(gang, (members.get(gang) ?? 0) + 1);
    const shared = byId.get(gang);
    for (const at of pathUp(byId, prefix)) {
      if (shared && at.end >= shared.end) gangOf.set(at.id, gang);
    }
  }
  const legend = [...members].sort((a, b) => b[1] - a[1]).slice(0, 8).map(([gang, n]) => ({
    colour: gangs.colour(gang),
    name: `${byId.get(gang)?.name ?? gang}: ${n} requests`,
  }));
  return {
    fill: ({ id }) => (gangOf.has(id) ? gangs.colour(gangOf.get(id)) : unused()),
    legend: [...legend, { colour: unused(), name: legend.length ? "no gang" : "no two requests share a prefix now" }],
  };
}

function rememberTenants(snapshot, byId) {
  const now = new Map();
  for (const { tenant, prefix } of everyone(snapshot)) {
    for (const { id } of pathUp(byId, prefix)) {
      const others = now.has(id) && now.get(id) !== tenant;
      now.set(id, others ? null : tenant);
    }
  }
  for (const [id, tenant] of now) lastTenant.set(id, tenant);
  for (const id of lastTenant.keys()) if (!byId.has(id)) lastTenant.delete(id);
}

function byTenant(snapshot, byId) {
  const seen = new Set([...lastTenant.values()].filter((tenant) => tenant !== null));
  const legend = [...seen].slice(0, 8).map((tenant) => ({ colour: tenants.colour(tenant), name: tenant || "no name" }));
  return {
    fill: ({ id }) => {
      if (!lastTenant.has(id)) return unused();
      const tenant = lastTenant.get(id);
      return tenant === null ? SEVERAL : tenants.colour(tenant);
    },
    legend: [...legend, { colour: SEVERAL, name: "several" }, { colour: unused(), name: "not used since this page is open" }],
  };
}

function byAge() {
  const steps = [[1, "used a second ago"], [10, "10 s"], [60, "a minute"], [600, "10 minutes"], [3600, "an hour or more"]];
  return {
    fill: ({ last_use_s: used }) => ageColour(used),
    legend: steps.map(([s, name]) => ({ colour: ageColour(s), name })),
  };
}
