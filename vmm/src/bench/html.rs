//! What was measured as one HTML page, with everything in it: tables, curves, the paper's figures beside ours.

use std::fmt::Write;

use super::model::{Cell, Measure, Published, Report, Table, in_order};
use super::plot;
use super::sample::{Summary, differ};
use super::text::number;

const STYLE: &str = "\
body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}\
h1,h2{line-height:1.2}h2{margin-top:2.5em;border-bottom:1px solid #ccc}\
table{border-collapse:collapse;margin:1em 0;font-size:13px}\
th,td{padding:.2em .7em;text-align:right;border-bottom:1px solid #eee}\
th:first-child,td:first-child{text-align:left}\
thead th{border-bottom:2px solid #999}\
.worse{color:#a40000}.better{color:#006400}.same,.noise,.missing{color:#888}\
.paper{background:#f6f3ea}small{color:#666}svg{max-width:100%;height:auto}";

/// The page.
pub fn render(report: &Report) -> String {
    let (host, build, settings) = (&report.host, &report.build, &report.settings);
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>flukevm bench</title>\
         <style>{STYLE}</style></head><body>\n<h1>flukevm bench</h1>\n"
    );
    let _ = writeln!(
        page,
        "<p>flukevm {} ({}) on {}, {} CPUs. Kernel code runs {}; the gate is <code>{}</code>; the time-stamp counter runs at {:.1} GHz. \
         Seed {}; {} machines of each configuration, in turn in an order drawn anew each round; {} samples in each; scale {}.</p>",
        escape(&build.version),
        escape(&build.profile),
        escape(&host.processor),
        host.cpus,
        escape(&host.kernel_code),
        escape(&host.gate),
        f64::from(host.tsc_khz) / 1e6,
        settings.seed,
        settings.reps,
        settings.batches,
        settings.scale
    );
    page.push_str(
        "<p>A value is the median; ± is the median distance from it. Others than the baseline have their multiple of it, or \
         <span class=\"same\">=</span> where the two do not differ by more than chance (95&nbsp;% intervals of the medians) and noise \
         (how far two measurements of the same configuration, in the same run, were apart).</p>\n<details><summary>Kernels</summary><ul>",
    );
    for (configuration, id) in &build.kernels {
        let _ = write!(
            page,
            "<li>{}: <code>{}</code></li>",
            escape(configuration),
            escape(id)
        );
    }
    page.push_str("</ul></details>\n<ul>");
    for table in &report.tables {
        let _ = write!(
            page,
            "<li><a href=\"#t{0}\">Table {0}</a>: {1}</li>",
            escape(&table.id),
            escape(&table.title)
        );
    }
    page.push_str("</ul>\n");
    for table in &report.tables {
        page.push_str(&self::table(table));
    }
    let _ = writeln!(
        page,
        "<p><small>Measured in {:.0} s.</small></p></body></html>",
        report.seconds
    );
    page
}

fn table(table: &Table) -> String {
    let mut text = format!(
        "<h2 id=\"t{0}\">Table {0}: {1}</h2>\n",
        escape(&table.id),
        escape(&table.title)
    );
    for measure in table.measures() {
        text.push_str(&of_measure(table, measure));
        if let Some(picture) = plot::bars(table, measure) {
            let _ = writeln!(text, "<div>{picture}</div>");
        }
    }
    text.push_str(&published(table));
    if let Some(why) = &table.difference {
        let _ = writeln!(text, "<p><b>Against the paper.</b> {}</p>", escape(why));
    }
    for curves in &table.plots {
        if let Some(picture) = plot::curves(curves) {
            let _ = writeln!(text, "<div>{picture}</div>");
        }
    }
    for note in &table.notes {
        let _ = writeln!(text, "<p><small>{}</small></p>", escape(note));
    }
    text
}

fn of_measure(table: &Table, measure: Measure) -> String {
    let cells = || table.cells.iter().filter(|cell| cell.measure == measure);
    let rows = in_order(cells().map(|cell| cell.row.as_str()));
    let columns = in_order(cells().map(|cell| cell.column.as_str()));
    let missing = in_order(cells().filter_map(|cell| cell.missing.as_deref()));
    let mut text = String::new();
    if cells().any(|cell| cell.summary.is_some()) {
        let noisy = table.noise.iter().any(|noise| noise.measure == measure);
        let head: String = columns.iter().map(|column| th(column)).collect();
        let noise = if noisy {
            "<th class=\"noise\">noise</th>"
        } else {
            ""
        };
        let _ = writeln!(
            text,
            "<table><thead><tr><th>{}</th>{head}{noise}</tr></thead><tbody>",
            measure.heading()
        );
        for row in rows {
            let _ = write!(text, "<tr><td>{}</td>", escape(row));
            for column in &columns {
                text.push_str(&value(table, row, column, measure));
            }
            if noisy {
                let noise = 100.0 * table.floor(row, measure);
                let _ = write!(text, "<td class=\"noise\">{noise:.1} %</td>");
            }
            text.push_str("</tr>\n");
        }
        text.push_str("</tbody></table>\n");
    }
    for why in missing {
        let heading = measure.heading();
        let _ = writeln!(
            text,
            "<p class=\"missing\">{heading}: – ({})</p>",
            escape(why)
        );
    }
    text
}

fn th(text: &str) -> String {
    format!("<th>{}</th>", escape(text))
}

fn value(table: &Table, row: &str, column: &str, measure: Measure) -> String {
    let Some(cell) = table.cell(row, column, measure) else {
        return "<td></td>".into();
    };
    let Some(summary) = cell.summary else {
        return "<td class=\"missing\">–</td>".into();
    };
    let median = number(summary.median);
    let base = table
        .baseline
        .as_deref()
        .filter(|baseline| *baseline != column)
        .and_then(|baseline| table.cell(row, baseline, measure))
        .and_then(|cell: &Cell| cell.summary)
        .filter(|base: &Summary| base.median != 0.0);
    match base {
        None if summary.is_exact() => format!("<td>{median}</td>"),
        None => format!(
            "<td>{median} <small>±{:.0} %</small></td>",
            100.0 * summary.spread / summary.median.abs().max(f64::MIN_POSITIVE)
        ),
        Some(base) if !differ(&base, &summary, table.floor(row, measure)) => {
            format!("<td>{median} <span class=\"same\">=</span></td>")
        }
        Some(base) => {
            let times = summary.median / base.median;
            let class = if times > 1.0 { "worse" } else { "better" };
            format!("<td>{median} <span class=\"{class}\">×{times:.2}</span></td>")
        }
    }
}

fn published(table: &Table) -> String {
    if table.published.is_empty() {
        return String::new();
    }
    let of = |name: fn(&Published) -> &String| {
        in_order(table.published.iter().map(|value| name(value).as_str()))
    };
    let (rows, columns) = (of(|value| &value.row), of(|value| &value.column));
    let head: String = columns.iter().map(|column| th(column)).collect();
    let mut text =
        format!("<table class=\"paper\"><thead><tr><th>OSDI '99</th>{head}</tr></thead><tbody>");
    for row in rows {
        let _ = write!(text, "<tr><td>{}</td>", escape(row));
        for column in &columns {
            let mut values = table.published.iter();
            let found = values.find(|value| value.row == row && value.column == *column);
            let value = found.map_or("", |value| value.text.as_str());
            let _ = write!(text, "<td>{}</td>", escape(value));
        }
        text.push_str("</tr>");
    }
    text.push_str("</tbody></table>\n");
    text
}

/// Text in which nothing is markup.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_its_values_the_papers_and_no_foreign_markup() {
        let cell = |column: &str, samples: &[f64]| {
            Cell::new("a <b>", column, Measure::Cycles, samples.to_vec(), 1)
        };
        let table = Table {
            id: "x".into(),
            title: "one & two".into(),
            baseline: Some("np".into()),
            cells: vec![
                cell("np", &[100.0, 100.0, 101.0]),
                cell("fp", &[200.0, 201.0, 202.0]),
                Cell::missing("a <b>", "pp", Measure::Cycles, "too slow"),
            ],
            published: vec![Published {
                row: "a <b>".into(),
                column: "np".into(),
                text: "1.00".into(),
            }],
            ..Table::default()
        };
        let html = super::table(&table);
        assert!(
            html.contains("one &amp; two") && html.contains("a &lt;b&gt;"),
            "{html}"
        );
        assert!(
            html.contains("×2.01") && html.contains("too slow"),
            "{html}"
        );
        assert!(html.contains("1.00") && html.contains("<svg"), "{html}");
    }
}
