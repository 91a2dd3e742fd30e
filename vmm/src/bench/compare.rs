//! What has changed between two reports: only what is more than chance and noise.

use std::fmt::Write;

use super::model::{Cell, Measure, Report, SCHEMA, Table};
use super::sample::differ;
use super::text::number;
use crate::error::Error;

/// Counts that differ by a smaller part are not worth a line: the clock may bring a switch into a short piece, which
/// has been seen to make 4.3 %.
const COUNTED_TOLERANCE: f64 = 0.06;
/// The same of times.
const TIMED_TOLERANCE: f64 = 0.03;

/// A value that has changed.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// The table.
    pub table: String,
    /// The row.
    pub row: String,
    /// The column.
    pub column: String,
    /// The measure.
    pub measure: Measure,
    /// Medians, then and now.
    pub medians: (f64, f64),
}

impl Change {
    /// By which part of the old value it has grown.
    pub fn part(&self) -> f64 {
        (self.medians.1 - self.medians.0) / self.medians.0
    }

    /// Whether it has become worse.
    pub fn is_regression(&self) -> bool {
        self.part() > 0.0
    }
}

/// What has changed.
#[derive(Clone, Debug, Default)]
pub struct Comparison {
    /// What is worse, and what is better, the greatest first.
    pub changes: Vec<Change>,
    /// Values compared.
    pub compared: usize,
    /// What a reader must know.
    pub notes: Vec<String>,
}

impl Comparison {
    /// Whether nothing is worse.
    pub fn holds(&self) -> bool {
        !self.changes.iter().any(Change::is_regression)
    }

    /// For people.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for note in &self.notes {
            let _ = writeln!(text, "note: {note}");
        }
        for change in &self.changes {
            let verdict = if change.is_regression() {
                "WORSE"
            } else {
                "better"
            };
            let _ = writeln!(
                text,
                "{verdict:6} {:+6.1} %  table {}, {}, {}: {} {} -> {}",
                100.0 * change.part(),
                change.table,
                change.row,
                change.column,
                change.measure.heading(),
                number(change.medians.0),
                number(change.medians.1)
            );
        }
        let worse = self.changes.iter().filter(|change| change.is_regression());
        let worse = worse.count();
        let _ = writeln!(
            text,
            "{} values compared, {worse} worse, {} better",
            self.compared,
            self.changes.len() - worse
        );
        text
    }
}

/// Reads a report.
///
/// # Errors
/// If it is none of this version.
pub fn read(name: &str, text: &str) -> Result<Report, Error> {
    let wrong = |why: String| Error::Image {
        name: name.into(),
        why: format!("{why}; give a file that `flukevm bench --save` has written"),
    };
    let value: serde_json::Value =
        serde_json::from_str(text).map_err(|error| wrong(format!("no JSON: {error}")))?;
    if value["schema"] != SCHEMA {
        return Err(wrong(format!(
            "a report of version {}, not {SCHEMA}",
            value["schema"]
        )));
    }
    serde_json::from_value(value).map_err(|error| wrong(format!("no report: {error}")))
}

/// Compares.
pub fn compare(old: &Report, new: &Report) -> Comparison {
    let mut found = Comparison::default();
    let same_host = old.host == new.host;
    if !same_host {
        found
            .notes
            .push("the reports are of different hosts, so only what is counted is compared".into());
    }
    if old.build.profile != new.build.profile {
        found.notes.push(format!(
            "the old report is of a {} build, the new one of a {} build, whose kernels differ",
            old.build.profile, new.build.profile
        ));
    }
    let same_work = old.settings.scale == new.settings.scale
        && old.settings.memtest_bytes == new.settings.memtest_bytes;
    if !same_work {
        found.notes.push(
            "the programs were told to do different amounts of work, so only what is counted is compared".into(),
        );
    }
    let same_pieces = old.settings.only == new.settings.only;
    for table in &new.tables {
        // Its rows are sums.
        if table.id == "5" && !same_pieces {
            continue;
        }
        let Some(before) = old.tables.iter().find(|before| before.id == table.id) else {
            continue;
        };
        for cell in &table.cells {
            let timed = !cell.measure.is_counted();
            if cell.measure.is_cost() && (!timed || same_host && same_work) {
                one(&mut found, before, table, cell);
            }
        }
    }
    found
        .changes
        .sort_by(|a, b| b.part().abs().total_cmp(&a.part().abs()));
    found
}

fn one(found: &mut Comparison, before: &Table, now: &Table, cell: &Cell) {
    let old = before.cell(&cell.row, &cell.column, cell.measure);
    let (Some(old), Some(new)) = (old.and_then(|old| old.summary), cell.summary) else {
        return;
    };
    found.compared += 1;
    let tolerance = match cell.measure.is_counted() {
        true => COUNTED_TOLERANCE,
        false => TIMED_TOLERANCE,
    };
    let floors = [before, now].map(|table| table.floor(&cell.row, cell.measure));
    let noise = floors[0].max(floors[1]).max(tolerance);
    if old.median > 0.0 && differ(&old, &new, noise) {
        found.changes.push(Change {
            table: now.id.clone(),
            row: cell.row.clone(),
            column: cell.column.clone(),
            measure: cell.measure,
            medians: (old.median, new.median),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::model::{Build, Host, Noise, Settings};

    fn report(cells: Vec<Cell>, noise: f64) -> Report {
        let noise = cells
            .iter()
            .map(|cell| Noise {
                row: cell.row.clone(),
                measure: cell.measure,
                part: noise,
            })
            .collect();
        Report {
            schema: SCHEMA,
            host: Host {
                kernel_code: "emulated".into(),
                processor: "a".into(),
                cpus: 2,
                gate: "ud2".into(),
                tsc_khz: 1,
            },
            build: Build {
                version: "1".into(),
                profile: "release".into(),
                kernels: Default::default(),
            },
            settings: Settings {
                quick: true,
                seed: 1,
                reps: 1,
                batches: 1,
                scale: 1,
                period_ns: 1,
                memtest_bytes: 4096,
                only: String::new(),
            },
            tables: vec![Table {
                id: "x".into(),
                cells,
                noise,
                ..Table::default()
            }],
            seconds: 1.0,
        }
    }

    fn cell(measure: Measure, value: f64) -> Cell {
        Cell::new("null", "process-np", measure, vec![value], 1)
    }

    #[test]
    fn a_report_is_like_itself() {
        let report = report(vec![cell(Measure::Instructions, 315.0)], 0.0);
        let found = compare(&report, &report);
        assert_eq!((found.compared, found.changes.len()), (1, 0));
        assert!(found.holds());
    }

    #[test]
    fn more_instructions_are_worse_and_fewer_are_better() {
        let old = report(vec![cell(Measure::Instructions, 300.0)], 0.0);
        let more = report(vec![cell(Measure::Instructions, 320.0)], 0.0);
        assert!(!compare(&old, &more).holds());
        let back = compare(&more, &old);
        assert!(back.holds() && back.changes.len() == 1);
        let one = report(vec![cell(Measure::Instructions, 303.0)], 0.0);
        assert!(
            compare(&old, &one).changes.is_empty(),
            "within the tolerance"
        );
    }

    #[test]
    fn what_is_below_the_noise_is_no_change() {
        let old = report(vec![cell(Measure::Cycles, 100.0)], 0.2);
        let new = report(vec![cell(Measure::Cycles, 115.0)], 0.0);
        assert!(compare(&old, &new).changes.is_empty());
    }

    #[test]
    fn times_of_another_host_say_nothing() {
        let cells = |factor| {
            vec![
                cell(Measure::Cycles, 100.0 * factor),
                cell(Measure::Instructions, 100.0 * factor),
            ]
        };
        let old = report(cells(1.0), 0.0);
        let mut new = report(cells(2.0), 0.0);
        new.host.tsc_khz = 2;
        let found = compare(&old, &new);
        assert_eq!((found.compared, found.changes.len()), (1, 1));
        assert_eq!(found.notes.len(), 1);
    }

    #[test]
    fn other_versions_are_refused() {
        let text = serde_json::to_string(&report(Vec::new(), 0.0)).unwrap();
        assert!(read("a", &text).is_ok());
        let newer = text.replace("\"schema\":1", "\"schema\":2");
        let why = read("a", &newer).unwrap_err().to_string();
        assert!(why.contains("version 2, not 1"), "{why}");
        assert!(read("a", "{").is_err());
    }
}
