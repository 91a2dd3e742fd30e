//! What was measured, as it is kept: the JSON of `flukevm bench`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::sample::Summary;

/// Version of this form. Reports of another one are not compared.
pub const SCHEMA: u32 = 1;

/// All that was measured in one run of the command.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Where.
    pub host: Host,
    /// Of what.
    pub build: Build,
    /// How.
    pub settings: Settings,
    /// What came of it.
    pub tables: Vec<Table>,
    /// Time that it took, seconds.
    pub seconds: f64,
}

/// The machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Host {
    /// How it runs kernel code: `emulated` or `hardware`.
    pub kernel_code: String,
    /// The processor's name.
    pub processor: String,
    /// CPUs.
    pub cpus: usize,
    /// The trap instruction of programs.
    pub gate: String,
    /// Frequency of the guest's time-stamp counter, kHz.
    pub tsc_khz: u32,
}

/// The build.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Build {
    /// Version of flukevm.
    pub version: String,
    /// Whether the host's part is optimised: `release` or `debug`. Kernels of debug builds check their locks.
    pub profile: String,
    /// Build ids of the kernel images, by configuration.
    pub kernels: BTreeMap<String, String>,
}

/// The settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Little of everything.
    pub quick: bool,
    /// Of the order of configurations, and of draws.
    pub seed: u64,
    /// Machines of each configuration.
    pub reps: u64,
    /// Samples that a machine takes of each piece of work.
    pub batches: u64,
    /// How many times the operations that pieces of work have on slow hosts.
    pub scale: u64,
    /// Nanoseconds between two ticks where latency is measured.
    pub period_ns: u64,
    /// Bytes that `memtest` touches.
    pub memtest_bytes: u64,
    /// What the names of the pieces of `flukeperf` begin with that were wanted.
    pub only: String,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    /// Instructions at CPL 0; a string instruction is one.
    Instructions,
    /// Cycles of the guest's time-stamp counter.
    Cycles,
    /// Wall time, microseconds.
    Microseconds,
    /// Bytes.
    Bytes,
    /// How many.
    Number,
    /// A share, per cent.
    Percent,
}

impl Measure {
    /// Its unit.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Instructions => "instructions",
            Self::Cycles => "cycles",
            Self::Microseconds => "us",
            Self::Bytes => "bytes",
            Self::Number => "",
            Self::Percent => "%",
        }
    }

    /// Its name in a table's heading.
    pub fn heading(self) -> &'static str {
        match self {
            Self::Instructions => "CPL 0 instructions",
            Self::Cycles => "TSC cycles",
            Self::Microseconds => "wall time, us",
            Self::Bytes => "bytes",
            Self::Number => "number",
            Self::Percent => "per cent",
        }
    }

    /// Whether the same machine gives the same value every time, and other machines nearly so.
    pub fn is_counted(self) -> bool {
        matches!(self, Self::Instructions | Self::Bytes)
    }

    /// Whether more of it is worse.
    pub fn is_cost(self) -> bool {
        matches!(
            self,
            Self::Instructions | Self::Cycles | Self::Microseconds | Self::Bytes
        )
    }
}

/// One value: a row of a table in a column, in one measure.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Cell {
    /// What it is about.
    pub row: String,
    /// Most often the configuration.
    pub column: String,
    /// In what.
    pub measure: Measure,
    /// The samples in short; none if there are none.
    pub summary: Option<Summary>,
    /// All samples.
    pub samples: Vec<f64>,
    /// Why there are none.
    pub missing: Option<String>,
}

impl Cell {
    /// A value of samples.
    pub fn new(
        row: impl Into<String>,
        column: impl Into<String>,
        measure: Measure,
        samples: Vec<f64>,
        seed: u64,
    ) -> Self {
        let summary = Summary::of(&samples, seed);
        Self {
            row: row.into(),
            column: column.into(),
            measure,
            missing: summary.is_none().then(|| "not measured".into()),
            summary,
            samples,
        }
    }

    /// A value that cannot be had.
    pub fn missing(
        row: impl Into<String>,
        column: impl Into<String>,
        measure: Measure,
        why: impl Into<String>,
    ) -> Self {
        Self {
            row: row.into(),
            column: column.into(),
            measure,
            summary: None,
            samples: Vec::new(),
            missing: Some(why.into()),
        }
    }
}

/// A value of the paper's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Published {
    /// Row.
    pub row: String,
    /// Column.
    pub column: String,
    /// As printed there, with its unit.
    pub text: String,
}

/// A curve: a name, and points.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Series {
    /// Name, most often the configuration.
    pub name: String,
    /// `(x, y)`.
    pub points: Vec<(f64, f64)>,
}

/// Curves of a table, and how to draw them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plot {
    /// What is shown.
    pub title: String,
    /// What goes from left to right, with its unit.
    pub x: String,
    /// What goes up.
    pub y: String,
    /// Whether x has a logarithmic axis.
    pub logarithmic: bool,
    /// The curves.
    pub series: Vec<Series>,
}

/// A table.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Table {
    /// As on the command line.
    pub id: String,
    /// What it shows.
    pub title: String,
    /// How it was measured, and what a reader must know.
    pub notes: Vec<String>,
    /// The column to which others are compared, if that makes sense.
    pub baseline: Option<String>,
    /// The values.
    pub cells: Vec<Cell>,
    /// By row and measure, how far two columns of the same configuration were apart, as a part of the first.
    pub noise: Vec<Noise>,
    /// The paper's values.
    pub published: Vec<Published>,
    /// Why ours differ from them.
    pub difference: Option<String>,
    /// Curves.
    pub plots: Vec<Plot>,
}

/// How far two measurements of the same thing were apart.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Noise {
    /// Row.
    pub row: String,
    /// Measure.
    pub measure: Measure,
    /// As a part of the first.
    pub part: f64,
}

impl Table {
    /// The value at a place.
    pub fn cell(&self, row: &str, column: &str, measure: Measure) -> Option<&Cell> {
        self.cells
            .iter()
            .find(|cell| cell.row == row && cell.column == column && cell.measure == measure)
    }

    /// The measures that occur, in order.
    pub fn measures(&self) -> Vec<Measure> {
        let mut measures: Vec<_> = self.cells.iter().map(|cell| cell.measure).collect();
        measures.sort_unstable();
        measures.dedup();
        measures
    }

    /// The noise of a row in a measure: what was seen there, but not less than what is usual in the table.
    pub fn floor(&self, row: &str, measure: Measure) -> f64 {
        let mut parts: Vec<f64> = self
            .noise
            .iter()
            .filter(|noise| noise.measure == measure)
            .map(|noise| noise.part)
            .collect();
        parts.sort_by(f64::total_cmp);
        let usual = super::sample::quantile(&parts, 0.5);
        let own = self
            .noise
            .iter()
            .find(|noise| noise.row == row && noise.measure == measure);
        own.map_or(usual, |noise| noise.part.max(usual))
    }
}

/// Names in order of their first occurrence.
pub fn in_order<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut found: Vec<&str> = Vec::new();
    for name in names {
        if !found.contains(&name) {
            found.push(name);
        }
    }
    found
}
