//! Table 6: how late a more important thread is, while `flukeperf` runs.

use super::applications::workload;
use crate::bench::model::{Cell, Measure, Plot, Series, Table};
use crate::bench::run::{Run, interleaved, once};
use crate::bench::{Bench, Tabulate};
use crate::error::Error;
use crate::image;

/// The table.
pub struct Latency;

/// A row: its name and measure, and its value in a run.
type Row = (&'static str, Measure, fn(&Run) -> Option<f64>);

/// Row of the longest stretch.
const LONGEST: &str = "longest stretch";
/// Row of the bytes that it moves.
const COPIED: &str = "copied in it";

impl Tabulate for Latency {
    fn id(&self) -> &'static str {
        "6"
    }

    fn title(&self) -> &'static str {
        "preemption latency while flukeperf runs (OSDI '99 table 6)"
    }

    fn measure(&self, bench: &Bench<'_>, table: &mut Table) -> Result<(), Error> {
        table.baseline = None;
        let settings = bench.settings();
        let rounds = match settings.quick {
            true => settings.reps.min(1),
            false => settings.reps,
        };
        let mut watched = workload(bench, "flukeperf", false);
        if settings.quick {
            watched.args[0] = "batches=1".into();
        }
        watched.args.push(format!("period={}", settings.period_ns));
        let columns = bench.configurations();
        let found = interleaved(&columns, rounds, settings.seed, |column, round| {
            (bench.progress)(&format!("latency, round {}: {}", round + 1, column.name));
            once(&watched, column)
        })?;
        let mut series = Vec::new();
        for (column, runs) in &found {
            let of = |what: fn(&Run) -> Option<f64>| runs.iter().filter_map(what).collect();
            let rows: [Row; 5] = [
                ("average", Measure::Microseconds, |run| {
                    Some(*run.latency.get("sum")? as f64 / *run.latency.get("runs")? as f64 / 1e3)
                }),
                ("99th percentile", Measure::Microseconds, |run| {
                    percentile(&run.late, 0.99)
                }),
                ("maximum", Measure::Microseconds, |run| {
                    Some(*run.latency.get("max")? as f64 / 1e3)
                }),
                ("runs", Measure::Number, |run| {
                    Some(*run.latency.get("runs")? as f64)
                }),
                ("misses", Measure::Number, |run| {
                    Some(*run.latency.get("misses")? as f64)
                }),
            ];
            for (row, measure, what) in rows {
                table
                    .cells
                    .push(bench.cell(row, &column.name, measure, of(what)));
            }
            series.push(distribution(&column.name, runs));
        }
        table.plots.push(Plot {
            title: "How late: the part of the wakings that were at most so late".into(),
            x: "microseconds".into(),
            y: "part".into(),
            logarithmic: true,
            series,
        });
        stretches(bench, table)?;
        table.notes.push(format!(
            "A thread of the highest priority, in user mode, sleeps until each multiple of {} us, and looks at the counter when it \
             runs. A miss is a multiple that passed while it was still late for the one before. The counter is set by the \
             kernel's clock, to within {} us.",
            settings.period_ns / 1000,
            found
                .iter()
                .flat_map(|(_, runs)| runs)
                .filter_map(|run| run.latency.get("doubt"))
                .max()
                .unwrap_or(&0)
                .div_ceil(1000)
        ));
        Ok(())
    }
}

/// The longest stretches in which nobody else can run, counted.
fn stretches(bench: &Bench<'_>, table: &mut Table) -> Result<(), Error> {
    if let Some(why) = bench.uncountable() {
        for column in bench.configurations() {
            let cell = Cell::missing(LONGEST, &column.name, Measure::Instructions, why);
            table.cells.push(cell);
        }
        return Ok(());
    }
    for found in bench.application("flukeperf")? {
        let Some(counted) = &found.counted else {
            continue;
        };
        let longest = counted
            .pieces
            .iter()
            .map(|piece| (&piece.longest, &piece.name))
            .max_by_key(|(stretch, _)| stretch.instructions + stretch.bytes / 8);
        let Some((stretch, piece)) = longest else {
            continue;
        };
        let name = &found.column.name;
        let instructions = vec![stretch.instructions as f64];
        table
            .cells
            .push(bench.cell(LONGEST, name, Measure::Instructions, instructions));
        let bytes = vec![stretch.bytes as f64];
        table
            .cells
            .push(bench.cell(COPIED, name, Measure::Bytes, bytes));
        if !found.column.is_again() {
            let image = image::kernel(found.column.configuration.image())?;
            table.notes.push(format!(
                "Longest stretch in {name}, of all pieces of flukeperf stepped through: {} instructions that move {} bytes, in \
                 {piece}: {}.",
                stretch.instructions,
                stretch.bytes,
                stretch.describe(image)
            ));
        }
    }
    table.notes.push(
        "A stretch is what the kernel executes between two places where somebody else could come to run: its entry, an instruction \
         with interrupts allowed, a preemption point, its exit. The longest is that with most instructions and words moved."
            .into(),
    );
    Ok(())
}

/// The lateness, microseconds, that a part of the wakings did not exceed, to the end of its bin.
fn percentile(late: &[(u64, u64)], part: f64) -> Option<f64> {
    let all: u64 = late.iter().map(|(_, count)| count).sum();
    let mut seen = 0;
    for (place, (_, count)) in late.iter().enumerate() {
        seen += count;
        if seen as f64 >= part * all as f64 {
            let end = late.get(place + 1).unwrap_or(&late[place]).0;
            return Some(end as f64 / 1e3);
        }
    }
    None
}

/// The distribution over all runs.
fn distribution(name: &str, runs: &[Run]) -> Series {
    let mut bins = std::collections::BTreeMap::new();
    for (least, count) in runs.iter().flat_map(|run| &run.late) {
        *bins.entry(*least).or_insert(0u64) += count;
    }
    let all: u64 = bins.values().sum();
    let mut seen = 0;
    let points = bins.iter().map(|(least, count)| {
        seen += count;
        (*least as f64 / 1e3, seen as f64 / all.max(1) as f64)
    });
    Series {
        name: name.into(),
        points: points.collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_come_from_the_bins() {
        let late = [(1000, 90), (2000, 9), (8000, 1)];
        assert_eq!(percentile(&late, 0.5), Some(2.0));
        assert_eq!(percentile(&late, 0.99), Some(8.0));
        assert_eq!(percentile(&late, 1.0), Some(8.0));
        assert_eq!(percentile(&[], 0.5), None);
    }
}
