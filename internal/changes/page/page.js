// The page's script: a treemap of changed bytes and a list of changes, both from the
// data in #data. Names come from a stranger's image: they are only ever set as
// text, never as markup.
"use strict";
(() => {
  const KINDS = ["added", "removed", "modified", "renamed", "touched"];
  const PAGE = 100, TILES = 80, MAP_TITLE = 20;
  const $ = id => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  // A row of data: kind, path, former path, size before, size after, weight, detail.
  const rows = data.rows.map(([kind, path, from, before, after, weight, detail], i) =>
    ({ i, kind, path, from, before, after, weight, detail, growth: (after ?? 0) - (before ?? 0),
       text: (path + "\n" + from + "\n" + detail).toLowerCase() }));

  const el = (tag, className, text) => {
    const e = document.createElement(tag);
    if (className) e.className = className;
    if (text !== undefined) e.textContent = text;
    return e;
  };
  const number = new Intl.NumberFormat("en");
  const bytes = n => {
    const sign = n < 0 ? "−" : "";
    let v = Math.abs(n), unit = 0;
    if (v < 1024) return sign + v + " B";
    while (v >= 1023.95 && unit < 6) { v /= 1024; unit++; }
    return sign + v.toFixed(1) + " " + "?KMGTPE"[unit] + "iB";
  };

  // The tree of changed bytes. Maps, not objects: a name may be "__proto__".
  const root = { name: "", path: "", weight: 0, count: 0, kinds: [0, 0, 0], dirs: new Map(), files: [], parent: null };
  for (const row of rows) {
    if (!row.weight) continue;
    const parts = row.path.split("/");
    let at = root;
    for (let i = 0; ; i++) {
      at.weight += row.weight;
      at.count++;
      at.kinds[row.kind] += row.weight;
      if (i === parts.length - 1) break;
      let next = at.dirs.get(parts[i]);
      if (!next) {
        next = { name: parts[i], path: parts.slice(0, i + 1).join("/"), weight: 0, count: 0, kinds: [0, 0, 0], dirs: new Map(), files: [], parent: at };
        at.dirs.set(parts[i], next);
      }
      at = next;
    }
    at.files.push({ name: parts[parts.length - 1], weight: row.weight, row });
  }

  // A directory with nothing but one directory is shown as one: usr/lib.
  const collapse = dir => {
    let label = dir.name;
    while (dir.dirs.size === 1 && dir.files.length === 0) {
      dir = dir.dirs.values().next().value;
      label += "/" + dir.name;
    }
    return { dir, label, name: label, weight: dir.weight };
  };
  const children = dir => {
    const list = [...dir.dirs.values()].map(collapse).concat(dir.files);
    list.sort((a, b) => b.weight - a.weight || (a.name < b.name ? -1 : 1));
    if (list.length > TILES) {
      const rest = list.splice(TILES - 1);
      list.push({ name: number.format(rest.length) + " more", rest: true, weight: rest.reduce((s, x) => s + x.weight, 0) });
    }
    return list;
  };

  // Squarified treemap (Bruls, Huizing, van Wijk): rows along the shorter side whose worst
  // aspect ratio is the best.
  const squarify = (items, x, y, w, h) => {
    const total = items.reduce((s, i) => s + i.weight, 0), out = [];
    if (!total || w <= 0 || h <= 0) return out;
    const scale = w * h / total;
    let at = 0;
    while (at < items.length) {
      const side = Math.min(w, h);
      let sum = 0, end = at, worst = Infinity;
      while (end < items.length) {
        const next = sum + items[end].weight * scale;
        const ratio = Math.max(side * side * items[at].weight * scale / (next * next), next * next / (side * side * items[end].weight * scale));
        if (ratio > worst) break;
        worst = ratio; sum = next; end++;
      }
      const thick = sum / side;
      let along = 0;
      for (let i = at; i < end; i++) {
        const long = items[i].weight * scale / thick;
        out.push(w >= h ? { item: items[i], x, y: y + along, w: thick, h: long } : { item: items[i], x: x + along, y, w: long, h: thick });
        along += long;
      }
      if (w >= h) { x += thick; w -= thick; } else { y += thick; h -= thick; }
      at = end;
    }
    return out;
  };
  const place = (e, r) => {
    e.style.left = r.x + "px"; e.style.top = r.y + "px";
    e.style.width = Math.max(0, r.w) + "px"; e.style.height = Math.max(0, r.h) + "px";
  };
  const mainKind = dir => KINDS[dir.kinds.indexOf(Math.max(...dir.kinds))];

  const map = $("map"), crumbs = $("crumbs");
  let here = root;
  const drawMap = focus => {
    map.replaceChildren();
    const tiles = squarify(children(here), 0, 0, map.clientWidth, map.clientHeight);
    tiles.forEach((r, i) => {
      const { item } = r, button = el("button");
      button.type = "button";
      button.tabIndex = i ? -1 : 0;
      const name = item.dir ? item.label + "/" : item.name;
      let say = name + ", " + bytes(item.weight);
      if (item.dir) {
        say += ", directory with " + number.format(item.dir.count) + " changes, mostly " + mainKind(item.dir);
        button.addEventListener("click", () => enter(item.dir, true));
        if (r.w > 30 && r.h > 34)
          for (const s of squarify(children(item.dir), 3, MAP_TITLE, r.w - 8, r.h - MAP_TITLE - 5)) {
            const tile = el("i", s.item.dir ? mainKind(s.item.dir) : s.item.rest ? "" : KINDS[s.item.row.kind]);
            if (s.w > 40 && s.h > 16) tile.textContent = s.item.name + (s.item.dir ? "/" : "");
            place(tile, s);
            button.append(tile);
          }
        else button.className = mainKind(item.dir);
      } else if (item.rest) {
        say += ", see the list below";
        button.addEventListener("click", () => $("search").focus());
      } else {
        say += ", " + KINDS[item.row.kind];
        button.className = KINDS[item.row.kind];
        button.addEventListener("click", () => { $("search").value = item.row.path; refresh(); $("search").focus(); });
      }
      button.title = say;
      button.setAttribute("aria-label", say);
      if (r.w > 34 && r.h > 18) {
        const label = el("span", "label");
        label.append(el("b", "", name), " " + bytes(item.weight));
        button.append(label);
      }
      place(button, r);
      map.append(button);
    });
    map.setAttribute("aria-label", "Treemap of changed bytes in " + (here.path || "the whole image") + "; arrow keys move, Enter opens, Escape goes up");
    if (focus && map.firstChild) map.firstChild.focus();
  };
  const enter = (dir, focus) => {
    here = dir;
    crumbs.replaceChildren();
    const chain = [];
    for (let d = dir; d; d = d.parent) chain.unshift(d);
    chain.forEach((d, i) => {
      const b = el("button", "", d.name || "image");
      b.type = "button";
      if (d === dir) b.setAttribute("aria-current", "location");
      b.addEventListener("click", () => enter(d, true));
      crumbs.append(b, i < chain.length - 1 ? " / " : "");
    });
    crumbs.append(" " + bytes(dir.weight) + " in " + number.format(dir.count) + " changes");
    drawMap(focus);
    refresh();
  };
  map.addEventListener("keydown", e => {
    const tiles = [...map.children], i = tiles.indexOf(document.activeElement);
    let to = -1;
    switch (e.key) {
      case "ArrowRight": case "ArrowDown": to = Math.min(tiles.length - 1, i + 1); break;
      case "ArrowLeft": case "ArrowUp": to = Math.max(0, i - 1); break;
      case "Home": to = 0; break;
      case "End": to = tiles.length - 1; break;
      case "Escape": case "Backspace": if (here.parent) enter(here.parent, true); break;
      default: return;
    }
    e.preventDefault();
    if (to < 0 || i < 0) return;
    tiles[i].tabIndex = -1;
    tiles[to].tabIndex = 0;
    tiles[to].focus();
  });

  // The list: filtered, sorted, a page of it in the document.
  const body = $("rows"), boxes = [...document.querySelectorAll("[data-kind]")];
  let shown = rows, page = 0, sortBy = "weight", down = true;
  const draw = () => {
    const pages = Math.max(1, Math.ceil(shown.length / PAGE));
    page = Math.min(page, pages - 1);
    const from = page * PAGE, some = shown.slice(from, from + PAGE);
    body.replaceChildren(...some.map(row => {
      const tr = el("tr");
      const kind = el("td");
      kind.append(el("span", "kind " + KINDS[row.kind], KINDS[row.kind]));
      const size = n => el("td", "n", n === null ? "" : bytes(n));
      tr.append(kind, el("td", "name", row.from ? row.from + " → " + row.path : row.path), size(row.before), size(row.after),
        el("td", "n", row.growth ? (row.growth > 0 ? "+" : "") + bytes(row.growth) : ""), el("td", "", row.detail));
      return tr;
    }));
    $("count").textContent = shown.length
      ? number.format(from + 1) + "–" + number.format(from + some.length) + " of " + number.format(shown.length)
      : "nothing matches";
    $("prev").disabled = page === 0;
    $("next").disabled = page === pages - 1;
  };
  const compare = (a, b) => {
    const x = a[sortBy] ?? -1, y = b[sortBy] ?? -1;
    return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1) || a.i - b.i;
  };
  const refresh = () => {
    const words = $("search").value.toLowerCase(), want = new Set(boxes.filter(b => b.checked).map(b => KINDS.indexOf(b.dataset.kind)));
    const below = here.path ? here.path + "/" : "";
    shown = rows.filter(r => want.has(r.kind) && r.path.startsWith(below) && r.text.includes(words)).sort(compare);
    $("where").textContent = below ? "in " + here.path : "";
    page = 0;
    draw();
  };
  $("search").addEventListener("input", refresh);
  boxes.forEach(b => b.addEventListener("change", refresh));
  $("prev").addEventListener("click", () => { page--; draw(); });
  $("next").addEventListener("click", () => { page++; draw(); });
  for (const b of document.querySelectorAll("[data-sort]"))
    b.addEventListener("click", () => {
      const key = b.dataset.sort;
      down = sortBy === key ? !down : key !== "path" && key !== "kind";
      sortBy = key;
      document.querySelectorAll("th[aria-sort]").forEach(th => th.removeAttribute("aria-sort"));
      b.parentElement.setAttribute("aria-sort", down ? "descending" : "ascending");
      refresh();
    });

  $("changes").hidden = false;
  $("treemap").hidden = root.weight === 0;
  enter(root, false);
  new ResizeObserver(() => drawMap(map.contains(document.activeElement))).observe(map);
})();
