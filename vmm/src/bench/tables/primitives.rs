//! What each primitive costs: the pieces of `flukeperf`.

use super::applications::Found;
use crate::bench::model::{Cell, Measure, Table};
use crate::bench::{Bench, Tabulate, samples_of};
use crate::error::Error;

/// What the names of pieces of work begin with that have tables of their own.
pub const OTHERS: [&str; 2] = ["extract-", "restart-"];

/// The table.
pub struct Primitives;

impl Tabulate for Primitives {
    fn id(&self) -> &'static str {
        "primitives"
    }

    fn title(&self) -> &'static str {
        "what one operation of each primitive costs"
    }

    fn measure(&self, bench: &Bench<'_>, table: &mut Table) -> Result<(), Error> {
        fill(bench, table, &|name| {
            name != "nothing" && !OTHERS.iter().any(|other| name.starts_with(other))
        })?;
        table.notes.push(
            "Instructions are those of the kernel (CPL 0), counted by stepping through it; a string instruction is one, \
             however much it copies, and visits for interrupts are left out. Cycles are the guest's time-stamp counter's, and \
             have the user-mode part in them."
                .into(),
        );
        Ok(())
    }
}

/// Fills in the pieces of `flukeperf` that are wanted.
pub fn fill(
    bench: &Bench<'_>,
    table: &mut Table,
    wanted: &dyn Fn(&str) -> bool,
) -> Result<(), Error> {
    let found = bench.application("flukeperf")?;
    let order: Vec<String> = match found.first() {
        Some(Found {
            counted: Some(counted),
            ..
        }) => counted
            .pieces
            .iter()
            .map(|piece| piece.name.clone())
            .collect(),
        Some(Found { runs, .. }) => runs.first().map_or_else(Vec::new, |run| run.order.clone()),
        None => Vec::new(),
    };
    for row in order.iter().filter(|name| wanted(name)) {
        for Found {
            column,
            runs,
            counted,
        } in found
        {
            let counted = counted
                .as_ref()
                .and_then(|counted| counted.per_operation.get(row));
            let instructions = match (counted, bench.uncountable()) {
                (Some(&count), _) => {
                    bench.cell(row, &column.name, Measure::Instructions, vec![count])
                }
                (None, why) => {
                    let why = why.unwrap_or("it was not counted");
                    Cell::missing(row, &column.name, Measure::Instructions, why)
                }
            };
            table.cells.push(instructions);
            let cycles = samples_of(runs, row);
            table
                .cells
                .push(bench.cell(row, &column.name, Measure::Cycles, cycles));
        }
    }
    Ok(())
}
