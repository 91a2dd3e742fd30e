//! What was measured, for people.

use std::fmt::Write;

use comfy_table::{CellAlignment, presets};

use super::model::{Cell, Measure, Report, Table, in_order};
use super::sample::{Summary, differ};

/// The report.
pub fn render(report: &Report) -> String {
    let mut text = String::new();
    let (host, build, settings) = (&report.host, &report.build, &report.settings);
    let _ = writeln!(
        text,
        "flukevm {} ({}) on {}, {} CPUs; kernel code {}, gate {}, TSC {:.1} GHz",
        build.version,
        build.profile,
        host.processor,
        host.cpus,
        host.kernel_code,
        host.gate,
        f64::from(host.tsc_khz) / 1e6
    );
    let _ = writeln!(
        text,
        "seed {}, {} machines of each configuration in turn, {} samples in each, scale {}",
        settings.seed, settings.reps, settings.batches, settings.scale
    );
    for table in &report.tables {
        text.push_str(&self::table(table));
    }
    let _ = writeln!(text, "\n{:.0} s", report.seconds);
    text
}

/// One table.
pub fn table(table: &Table) -> String {
    let mut text = format!("\nTable {}: {}\n", table.id, table.title);
    for measure in table.measures() {
        text.push_str(&of_measure(table, measure));
    }
    text.push_str(&published(table));
    for note in &table.notes {
        text.push_str(&wrapped(note, "  "));
    }
    if let Some(why) = &table.difference {
        text.push_str(&wrapped(&format!("Against the paper: {why}"), "  "));
    }
    text
}

/// An empty table of this look.
fn grid() -> comfy_table::Table {
    let mut grid = comfy_table::Table::new();
    grid.load_style(presets::NOTHING);
    grid
}

fn of_measure(table: &Table, measure: Measure) -> String {
    let cells = || table.cells.iter().filter(|cell| cell.measure == measure);
    let rows = in_order(cells().map(|cell| cell.row.as_str()));
    let columns = in_order(cells().map(|cell| cell.column.as_str()));
    let missing = in_order(cells().filter_map(|cell| cell.missing.as_deref()));
    if cells().all(|cell| cell.summary.is_none()) {
        return wrapped(
            &format!("{}: - ({})", measure.heading(), missing.join("; ")),
            "  ",
        );
    }
    let mut grid = grid();
    let baseline = table
        .baseline
        .as_deref()
        .filter(|baseline| columns.contains(baseline));
    let heading = [measure.heading()]
        .into_iter()
        .chain(columns.iter().copied());
    let with_noise = measure_has_noise(table, measure);
    grid.set_header(heading.chain(with_noise.then_some("noise")));
    for row in rows {
        let base = baseline
            .and_then(|column| table.cell(row, column, measure))
            .and_then(|cell| cell.summary);
        let noise = table.floor(row, measure);
        let value = |column: &&str| {
            let Some(cell) = table.cell(row, column, measure) else {
                return String::new();
            };
            value(cell, base.filter(|_| baseline != Some(*column)), noise)
        };
        let line = [row.to_string()]
            .into_iter()
            .chain(columns.iter().map(value));
        let noise = with_noise.then(|| format!("{:.1} %", noise * 100.0));
        grid.add_row(line.chain(noise));
    }
    for column in grid.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let mut text = format!("\n{}", trimmed(&grid));
    for why in missing {
        text.push_str(&wrapped(&format!("-: {why}"), "  "));
    }
    text
}

fn measure_has_noise(table: &Table, measure: Measure) -> bool {
    table.noise.iter().any(|noise| noise.measure == measure)
}

/// A value: the baseline's with its spread, others as multiples of it, or `=` where there is no difference.
fn value(cell: &Cell, base: Option<Summary>, noise: f64) -> String {
    let Some(summary) = cell.summary else {
        return "-".into();
    };
    match base {
        None if summary.is_exact() => number(summary.median),
        None => format!(
            "{} ±{:.0}%",
            number(summary.median),
            100.0 * summary.spread / summary.median.abs().max(f64::MIN_POSITIVE)
        ),
        Some(base) if base.median == 0.0 => number(summary.median),
        Some(base) if !differ(&base, &summary, noise) => format!("{} =", number(summary.median)),
        Some(base) => format!(
            "{} x{:.2}",
            number(summary.median),
            summary.median / base.median
        ),
    }
}

/// A number with as many digits as mean something.
pub fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 1e9 => format!("{:.2}G", value / 1e9),
        v if v >= 1e7 => format!("{:.1}M", value / 1e6),
        v if v >= 100.0 || value.fract() == 0.0 => format!("{value:.0}"),
        v if v >= 1.0 => format!("{value:.1}"),
        _ => format!("{value:.3}"),
    }
}

fn published(table: &Table) -> String {
    if table.published.is_empty() {
        return String::new();
    }
    let rows = in_order(table.published.iter().map(|value| value.row.as_str()));
    let columns = in_order(table.published.iter().map(|value| value.column.as_str()));
    let mut grid = grid();
    grid.set_header(["OSDI '99"].into_iter().chain(columns.iter().copied()));
    for row in rows {
        let value = |column: &&str| {
            let mut values = table.published.iter();
            let found = values.find(|value| value.row == row && value.column == *column);
            found.map_or(String::new(), |value| value.text.clone())
        };
        grid.add_row(
            [row.to_string()]
                .into_iter()
                .chain(columns.iter().map(value)),
        );
    }
    for column in grid.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    format!("\n{}", trimmed(&grid))
}

fn trimmed(grid: &comfy_table::Table) -> String {
    let mut text = String::new();
    for line in grid.to_string().lines() {
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

/// Text in lines that fit a terminal.
fn wrapped(text: &str, indent: &str) -> String {
    const WIDTH: usize = 110;
    let mut lines = String::new();
    let mut line = String::from(indent);
    for word in text.split_whitespace() {
        if line.len() + word.len() > WIDTH && line.len() > indent.len() {
            let _ = writeln!(lines, "{}", line.trim_end());
            line = String::from(indent);
        }
        let _ = write!(line, "{word} ");
    }
    let _ = writeln!(lines, "{}", line.trim_end());
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(column: &str, samples: &[f64]) -> Cell {
        Cell::new("null", column, Measure::Cycles, samples.to_vec(), 1)
    }

    #[test]
    fn others_are_multiples_of_the_baseline_or_the_same() {
        let table = Table {
            id: "x".into(),
            title: "a test".into(),
            baseline: Some("a".into()),
            cells: vec![
                cell("a", &[100.0, 101.0, 102.0]),
                cell("b", &[150.0, 151.0, 152.0]),
                cell("c", &[100.0, 101.0, 103.0]),
                Cell::missing("null", "d", Measure::Cycles, "too far away"),
            ],
            ..Table::default()
        };
        let text = super::table(&table);
        assert!(text.contains("101 ±1%"), "{text}");
        assert!(text.contains("151 x1.50"), "{text}");
        assert!(text.contains("101 ="), "{text}");
        assert!(text.contains("-: too far away"), "{text}");
    }

    #[test]
    fn numbers_keep_what_means_something() {
        for (value, text) in [
            (3.0, "3"),
            (3.25, "3.2"),
            (123.4, "123"),
            (0.5, "0.500"),
            (2.5e10, "25.00G"),
        ] {
            assert_eq!(number(value), text);
        }
    }
}
