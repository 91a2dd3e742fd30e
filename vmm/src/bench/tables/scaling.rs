//! What more vCPUs bring.

use crate::bench::model::{Measure, Plot, Series, Table};
use crate::bench::run::{Workload, interleaved, once};
use crate::bench::{Bench, Tabulate, samples_of};
use crate::error::Error;

/// Numbers of vCPUs.
const VCPUS: [u32; 4] = [1, 2, 3, 4];
/// Pairs of a client and a server.
const PAIRS: u32 = 4;
/// The pieces of work.
const PIECES: [&str; 2] = ["messages", "computing"];

/// The table.
pub struct Scaling;

impl Tabulate for Scaling {
    fn id(&self) -> &'static str {
        "smp"
    }

    fn title(&self) -> &'static str {
        "the same work on 1 to 4 vCPUs"
    }

    fn measure(&self, bench: &Bench<'_>, table: &mut Table) -> Result<(), Error> {
        let settings = bench.settings();
        // By number of vCPUs, in the same turn.
        let rounds = settings.reps.min(if settings.quick { 1 } else { 3 });
        let batches = if settings.quick { 1 } else { settings.batches };
        let columns = bench.few();
        let found = interleaved(&columns, rounds, settings.seed, |column, _| {
            let run = |vcpus| {
                (bench.progress)(&format!("{vcpus} vCPUs, {}", column.name));
                let args = [
                    format!("pairs={PAIRS}"),
                    format!("batches={batches}"),
                    format!("scale={}", settings.scale),
                ];
                let mut workload = Workload::new("flukeperf", &args);
                workload.vcpus = vcpus;
                once(&workload, column)
            };
            VCPUS.map(run).into_iter().collect::<Result<Vec<_>, _>>()
        })?;
        for piece in PIECES {
            let mut series = Vec::new();
            for (column, rounds) in &found {
                let mut points = Vec::new();
                let mut one = None;
                for (place, vcpus) in VCPUS.iter().enumerate() {
                    let runs: Vec<_> = rounds.iter().map(|runs| runs[place].clone()).collect();
                    let row = format!("{piece}, {vcpus} vCPUs");
                    let samples = samples_of(&runs, piece);
                    let cell = bench.cell(&row, &column.name, Measure::Cycles, samples);
                    let middle = cell.summary.map(|summary| summary.median);
                    one = one.or(middle);
                    if let (Some(one), Some(middle)) = (one, middle) {
                        points.push((f64::from(*vcpus), one / middle));
                    }
                    table.cells.push(cell);
                }
                series.push(Series {
                    name: column.name.clone(),
                    points,
                });
            }
            table.plots.push(Plot {
                title: format!("{piece}: how many times as fast as on one vCPU"),
                x: "vCPUs".into(),
                y: "times".into(),
                logarithmic: false,
                series,
            });
        }
        table.notes.push(format!(
            "{PAIRS} clients with a server each exchange messages, all at once; then as many threads compute. Cycles are those until all have \
             finished, by message or thread. This host has {} CPUs: more vCPUs than that share them.",
            std::thread::available_parallelism().map_or(1, usize::from)
        ));
        Ok(())
    }
}
