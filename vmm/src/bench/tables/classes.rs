//! Table 1: how entry points divide into classes.

use crate::api::Api;
use crate::bench::model::{Measure, Published, Table};
use crate::bench::{Bench, Tabulate};
use crate::error::Error;

/// The table.
pub struct Classes;

impl Tabulate for Classes {
    fn id(&self) -> &'static str {
        "1"
    }

    fn title(&self) -> &'static str {
        "entry points by class (OSDI '99 table 1)"
    }

    fn measure(&self, bench: &Bench<'_>, table: &mut Table) -> Result<(), Error> {
        table.baseline = None;
        for (class, here, counted, paper) in Api::new().classes() {
            for (column, value) in [("here", here), ("that the paper counts", counted)] {
                let value = vec![value as f64];
                table
                    .cells
                    .push(bench.cell(class, column, Measure::Number, value));
            }
            table.published.push(Published {
                row: class.into(),
                column: "entry points".into(),
                text: paper.to_string(),
            });
        }
        table.notes.push(
            "Counted in the table from which the kernel's dispatch is made; `flukevm api` lists them. `flukevm verify` proves of those that \
             can sleep that they are what their class says."
                .into(),
        );
        Ok(())
    }
}
