"use strict";
// The table of subjects: sorted by a click on a heading, filtered by words and by the values of some columns.
(() => {
  const byId = (id) => document.getElementById(id);
  const { headers, digits, filters, rows } = JSON.parse(byId("subject-data").textContent);
  const PAGE = 100;
  const search = byId("subject-search");
  const head = byId("subject-head");
  const body = byId("subject-body");
  const more = byId("subject-more");
  const chosen = new Map();
  let order = { column: -1, down: false };
  let limit = PAGE;

  const text = (value, column) => {
    if (value === null) return "-";
    return typeof value === "number" ? value.toFixed(digits[column]) : value;
  };

  function compare(a, b) { // missing values stand last in both directions
    const [x, y] = [a[order.column], b[order.column]];
    if (x === null || y === null) return (x === null) - (y === null);
    const sign = order.down ? -1 : 1;
    return sign * (typeof x === "number" && typeof y === "number" ? x - y
      : String(x).localeCompare(String(y), "en", { numeric: true }));
  }

  function draw() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let found = rows.filter((row) => [...chosen].every(([column, value]) => !value || row[column] === value));
    found = found.filter((row) => {
      const line = row.filter((cell) => typeof cell === "string").join(" ").toLowerCase();
      return words.every((word) => line.includes(word));
    });
    if (order.column >= 0) found.sort(compare);
    body.replaceChildren(...found.slice(0, limit).map((row) => {
      const line = document.createElement("tr");
      row.forEach((value, column) => {
        const cell = line.insertCell();
        cell.textContent = text(value, column);
        if (digits[column] !== null) cell.className = "number";
      });
      return line;
    }));
    byId("subject-count").textContent = `${Math.min(limit, found.length)} of ${found.length} rows shown` +
      (found.length < rows.length ? `, ${rows.length} in all` : "");
    more.hidden = found.length <= limit;
    [...head.cells].forEach((cell, column) => {
      const here = column === order.column;
      cell.setAttribute("aria-sort", here ? (order.down ? "descending" : "ascending") : "none");
    });
  }

  const again = () => { limit = PAGE; draw(); };
  headers.forEach((name, column) => {
    const cell = document.createElement("th");
    cell.scope = "col";
    if (digits[column] !== null) cell.className = "number";
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = name;
    button.addEventListener("click", () => {
      order = { column, down: order.column === column && !order.down };
      again();
    });
    cell.append(button);
    head.append(cell);
  });
  filters.forEach((column) => {
    const values = [...new Set(rows.map((row) => row[column]))].filter((value) => value !== null);
    if (values.length < 2) return;
    const label = document.createElement("label");
    const select = document.createElement("select");
    select.id = "subject-filter-" + column;
    select.append(new Option("all", ""), ...values.map((value) => new Option(value, value)));
    select.addEventListener("change", () => { chosen.set(column, select.value); again(); });
    label.append(headers[column], select);
    byId("subject-filters").append(label);
  });
  search.addEventListener("input", again);
  more.addEventListener("click", () => { limit += 5 * PAGE; draw(); });
  byId("subject-controls").hidden = false;
  draw();
})();
