//! Medians and spread, as a table and as JSON.

use std::fs;
use std::time::Duration;

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use super::contender::Contender;
use super::measure::Times;

/// A contender and its runs.
pub struct Row {
    /// Who.
    pub contender: Contender,
    /// All runs that count.
    pub runs: Vec<Times>,
    /// Why there are none.
    pub failure: Option<String>,
}

impl Row {
    /// No run yet.
    pub fn new(contender: Contender) -> Self {
        Self {
            contender,
            runs: Vec::new(),
            failure: None,
        }
    }
}

/// All there is to say.
pub struct Report {
    /// What kind of host this is.
    pub host: String,
    /// Versions of the programs.
    pub versions: Vec<String>,
    /// Load of the host before and after.
    pub load: [String; 2],
    /// Everybody.
    pub rows: Vec<Row>,
}

/// Times of a set of runs, milliseconds.
#[derive(Debug, PartialEq, Serialize)]
pub struct Summary {
    n: usize,
    median: f64,
    lower_quartile: f64,
    upper_quartile: f64,
    least: f64,
    most: f64,
    all: Vec<f64>,
}

impl Summary {
    /// Of some times; none if there are none.
    fn new(times: impl IntoIterator<Item = Duration>) -> Option<Self> {
        let all: Vec<f64> = times.into_iter().map(|t| t.as_secs_f64() * 1e3).collect();
        let mut sorted = all.clone();
        sorted.sort_by(f64::total_cmp);
        Some(Self {
            n: all.len(),
            least: *sorted.first()?,
            most: *sorted.last()?,
            median: quantile(&sorted, 0.5),
            lower_quartile: quantile(&sorted, 0.25),
            upper_quartile: quantile(&sorted, 0.75),
            all,
        })
    }
}

/// A quantile of sorted values, of which there is one at least.
fn quantile(sorted: &[f64], q: f64) -> f64 {
    let at = q * (sorted.len() - 1) as f64;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    low + (high - low) * at.fract()
}

#[derive(Serialize)]
struct JsonReport<'a> {
    host: &'a str,
    versions: &'a [String],
    load: &'a [String; 2],
    unit: &'static str,
    contenders: Vec<JsonRow<'a>>,
}

#[derive(Serialize)]
struct JsonRow<'a> {
    name: &'a str,
    command: String,
    failure: Option<&'a str>,
    first_user: Option<Summary>,
    first_line: Option<Summary>,
    exit: Option<Summary>,
}

impl<'a> JsonRow<'a> {
    fn new(row: &'a Row) -> Self {
        let runs = row.runs.iter();
        let guest = row.contender.marker.is_some();
        Self {
            name: row.contender.name,
            command: format!(
                "{} {}",
                row.contender.program.display(),
                row.contender.args.join(" ")
            ),
            failure: row.failure.as_deref(),
            first_user: Summary::new(runs.clone().filter_map(|times| times.first_user)),
            first_line: Summary::new(runs.clone().map(|times| times.output)).filter(|_| guest),
            exit: Summary::new(runs.map(|times| times.exit)),
        }
    }
}

impl Report {
    /// For programs.
    pub fn json(&self) -> impl Serialize {
        JsonReport {
            host: &self.host,
            versions: &self.versions,
            load: &self.load,
            unit: "ms",
            contenders: self.rows.iter().map(JsonRow::new).collect(),
        }
    }

    /// For people.
    pub fn text(&self) -> String {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header(["ms", "FIRST USER INSTRUCTION", "FIRST LINE", "EXIT", "N"]);
        let mut failures = String::new();
        for row in self.rows.iter().map(JsonRow::new) {
            if let Some(why) = row.failure {
                failures += &format!("{}: cannot be measured here: {why}\n", row.name);
                continue;
            }
            let n = row.exit.as_ref().map_or(0, |exit| exit.n);
            table.add_row([
                row.name.to_string(),
                cell(row.first_user.as_ref()),
                cell(row.first_line.as_ref()),
                cell(row.exit.as_ref()),
                n.to_string(),
            ]);
        }
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        let [before, after] = &self.load;
        format!(
            "{table}\n{failures}{}\n{}\nload {before} before, {after} after\n",
            self.host,
            self.versions.join("; ")
        )
    }
}

/// The median, and the quartiles.
fn cell(summary: Option<&Summary>) -> String {
    summary.map_or_else(String::new, |s| {
        format!(
            "{:.1} ({:.1}-{:.1})",
            s.median, s.lower_quartile, s.upper_quartile
        )
    })
}

/// The host's load over the last minute.
pub fn load() -> String {
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    load.split(' ').next().unwrap_or_default().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_quartiles_lie_between_values() {
        let ms = |n| Duration::from_millis(n);
        let summary = Summary::new([40, 10, 30, 20].map(ms)).unwrap();
        assert_eq!((summary.n, summary.median), (4, 25.0));
        assert_eq!(
            (summary.lower_quartile, summary.upper_quartile),
            (17.5, 32.5)
        );
        assert_eq!((summary.least, summary.most), (10.0, 40.0));
        assert_eq!(summary.all, [40.0, 10.0, 30.0, 20.0]);
        assert_eq!(Summary::new([ms(7)]).unwrap().upper_quartile, 7.0);
        assert_eq!(Summary::new([]), None);
    }

    #[test]
    fn who_cannot_be_measured_is_named_with_the_reason() {
        let mut failed = Row::new(Contender::version("QEMU", "/qemu".as_ref()));
        failed.failure = Some("no KVM".into());
        let mut measured = Row::new(Contender::run("/flukevm".as_ref()));
        let ms = Duration::from_millis;
        measured.runs.push(Times {
            first_user: Some(ms(1)),
            output: ms(2),
            exit: ms(3),
        });
        let report = Report {
            host: "host".into(),
            versions: vec!["a".into(), "b".into()],
            load: ["1".into(), "2".into()],
            rows: vec![failed, measured],
        };
        let text = report.text();
        assert!(
            text.contains("QEMU: cannot be measured here: no KVM\n"),
            "{text}"
        );
        assert!(text.contains("1.0 (1.0-1.0)"), "{text}");
        let json = serde_json::to_value(report.json()).unwrap();
        assert_eq!(json["contenders"][0]["failure"], "no KVM");
        assert_eq!(json["contenders"][1]["exit"]["median"], 3.0);
    }
}
