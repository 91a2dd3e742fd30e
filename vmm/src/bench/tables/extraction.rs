//! What it costs to take a thread's state, by what the thread is doing.

use super::primitives::fill;
use crate::bench::model::Table;
use crate::bench::{Bench, Tabulate};
use crate::error::Error;

/// The table.
pub struct Extraction;

impl Tabulate for Extraction {
    fn id(&self) -> &'static str {
        "extraction"
    }

    fn title(&self) -> &'static str {
        "thread_get_state with all five links, by what the thread is doing"
    }

    fn measure(&self, bench: &Bench<'_>, table: &mut Table) -> Result<(), Error> {
        fill(bench, table, &|name| name.starts_with("extract-"))?;
        table.notes.push(
            "The thread has been asleep in that call, or was running a loop, when a thread of higher or the same priority on the same \
             CPU takes its state; it does not run in between."
                .into(),
        );
        Ok(())
    }
}
