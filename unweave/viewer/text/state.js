// What is being looked at, kept in the page's address; and what the server last said. Parts of the page listen.
const START = { text: "", other: "", ablate: [], node: null, token: null, only: false, paint: "", measure: false };
export const state = { ...START };
export const known = { facts: null, answer: null };
const listeners = [];
export const onChange = (listener) => { listeners.push(listener); };
export function change(part) {
  Object.assign(state, part);
  writeAddress();
  for (const listener of listeners) listener(part);
}

function writeAddress() {
  const parts = new URLSearchParams();
  for (const name of ["text", "other", "node", "paint"]) if (state[name]) parts.set(name, state[name]);
  for (const name of state.ablate) parts.append("ablate", name);
  if (state.token !== null) parts.set("token", String(state.token));
  for (const name of ["only", "measure"]) if (state[name]) parts.set(name, "1");
  const hash = `#${parts}`;
  if (hash !== location.hash) history.replaceState(null, "", hash);
}
export function readAddress() {
  const parts = new URLSearchParams(location.hash.slice(1)), token = Number.parseInt(parts.get("token") ?? "", 10);
  change({
    text: parts.get("text") ?? "", other: parts.get("other") ?? "", node: parts.get("node"), paint: parts.get("paint") ?? "",
    ablate: [...new Set(parts.getAll("ablate"))], token: token >= 0 ? token : null,
    only: parts.get("only") === "1", measure: parts.get("measure") === "1",
  });
}
export function toggleAblation(name) {
  const without = state.ablate.filter((other) => other !== name);
  change({ ablate: without.length < state.ablate.length ? without : [...state.ablate, name] });
}
// nodes from the output's side down to the embedding, as they stand on the page
export const writers = () => known.facts.graphs[0].nodes.filter((node) => node.writes).reverse();
