//! What it costs an execution model that the hardware pushes a trap's frame where it likes (OSDI '99, 5.5).

use super::applications::counting;
use crate::bench::model::{Cell, Measure, Table};
use crate::bench::run::{Workload, interleaved, once};
use crate::bench::trace::{per_operation, pieces};
use crate::bench::{Bench, Column, Tabulate, samples_of};
use crate::config::{Model, Preempt};
use crate::error::Error;

/// The table.
pub struct Bias;

/// The kernel of the interrupt model that copies frames.
const COPIED: &str = "interrupt-copied";
/// Pieces of `flukeperf`: the call that does nothing, answered by the entry stub, and the shortest that enters the kernel.
const PIECES: [&str; 2] = ["null", "clock_read"];
/// Samples of each for one that other tables take: there is not much else to do.
const MORE: u64 = 4;

impl Tabulate for Bias {
    fn id(&self) -> &'static str {
        "5.5"
    }

    fn title(&self) -> &'static str {
        "the shortest calls, by where the hardware's frame goes (OSDI '99 section 5.5)"
    }

    fn measure(&self, bench: &Bench<'_>, table: &mut Table) -> Result<(), Error> {
        let columns = columns(bench);
        let Some(first) = columns.first() else {
            table
                .notes
                .push("Needs Process NP, or Interrupt NP, which were not wanted.".into());
            return Ok(());
        };
        table.baseline = Some(first.name.clone());
        let settings = bench.settings();
        for row in PIECES {
            let arg = format!("only={row}");
            let timed = Workload::new(
                "flukeperf",
                &[
                    arg.clone(),
                    format!("batches={}", settings.batches * MORE),
                    format!("scale={}", settings.scale),
                ],
            );
            let runs = interleaved(&columns, settings.reps, settings.seed, |column, round| {
                (bench.progress)(&format!("{row}, round {}: {}", round + 1, column.name));
                once(&timed, column)
            })?;
            for (column, runs) in &runs {
                let samples = samples_of(runs, row);
                table
                    .cells
                    .push(bench.cell(row, &column.name, Measure::Cycles, samples));
            }
            if let Some(why) = bench.uncountable() {
                let cells = columns
                    .iter()
                    .map(|column| Cell::missing(row, &column.name, Measure::Instructions, why));
                table.cells.extend(cells);
                continue;
            }
            let counted = Workload::new("flukeperf", &[arg, counting(settings)]);
            for (column, (pieces, _)) in
                bench.at_once(&columns, |column| pieces(&counted, column))?
            {
                let counts = per_operation(&pieces);
                let samples = counts.get(row).copied().into_iter().collect();
                table
                    .cells
                    .push(bench.cell(row, &column.name, Measure::Instructions, samples));
            }
        }
        table.notes.push(
            "null is thread_self, which the entry stub answers; clock_read is the shortest call that enters the kernel. In both models the \
             hardware pushes its frame into the thread itself, to which the task state segment's RSP0 points; the third kernel has RSP0 point \
             to the CPU's structure, and its stubs copy the seven words to the thread and five of them back, as Fluke did. Where the \
             gate is `syscall`, which pushes nothing, only the way back copies."
                .into(),
        );
        Ok(())
    }
}

/// The kernels of those configurations that are measured, the first of them twice.
fn columns(bench: &Bench<'_>) -> Vec<Column> {
    let mut columns = Vec::new();
    for column in bench.configurations() {
        if column.configuration.preempt() != Preempt::None {
            continue;
        }
        let copied = (column.configuration.model() == Model::Interrupt && column.mutant.is_none())
            .then(|| Column {
                name: format!("{}, copied", column.name),
                variant: Some(COPIED),
                ..column.clone()
            });
        columns.push(column);
        columns.extend(copied);
    }
    let again = columns.first().map(Column::again);
    columns.extend(again);
    columns
}
