//! Faults on every pointer of every entry point, in all places where the memory may come from, and
//! interruption at every wait: calls must end as if nothing had happened.

mod held;
pub mod messages;
pub mod pages;
mod table;
mod waits;

use core::fmt::Arguments;

use fluke_abi::code::Status;
use libfluke::{println, startup};

use crate::resume;
use pages::{Fault, Pages};

/// The checks so far.
#[derive(Default)]
pub struct Checks {
    done: u64,
    failed: u64,
}

impl Checks {
    /// Makes a check, and says what failed.
    pub fn that(&mut self, right: bool, what: Arguments<'_>) {
        self.done += 1;
        if !right {
            self.failed += 1;
            println!("faults: not as it must be: {what}");
        }
    }
}

/// What to test.
#[derive(Clone, Copy)]
enum Part {
    /// Entry points with parameters in registers.
    Table,
    /// Message transfers, with such faults.
    Messages(Fault),
    /// Interrupts and alerts in every wait, and looks at messages in their middle.
    Waits,
}

fn test(part: Part, checks: &mut Checks) -> Result<(), Status> {
    let pages = Pages::new()?;
    match part {
        Part::Table => table::test(pages, checks)?,
        Part::Messages(fault) => messages::test(pages, fault, checks)?,
        Part::Waits => {
            waits::test(pages, checks)?;
            held::test(pages, checks)?;
        }
    }
    checks.that(pages.odd() == 0, format_args!("faults that make no sense"));
    Ok(())
}

/// The program.
pub fn main() -> u64 {
    resume::install();
    let part = match startup::args().nth(1) {
        None => Part::Table,
        Some("soft") => Part::Messages(Fault::Soft),
        Some("hard") => Part::Messages(Fault::Hard),
        Some("orphan") => Part::Messages(Fault::Orphan),
        Some("waits") => Part::Waits,
        Some(_) => {
            println!("faults: usage: faults [soft | hard | orphan | waits]");
            return crate::USAGE;
        }
    };
    let mut checks = Checks::default();
    if let Err(status) = test(part, &mut checks) {
        println!("faults: cannot begin: {status:?}");
        return crate::FAILED;
    }
    println!("faults: {} checks, {} failed", checks.done, checks.failed);
    if checks.failed == 0 { 0 } else { crate::FAILED }
}
