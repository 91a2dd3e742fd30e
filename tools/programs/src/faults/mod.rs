//! Faults on every pointer of every entry point, in all places where the memory may come from, and
//! interruption at every wait: calls must end as if nothing had happened.

pub mod pages;
mod table;

use core::fmt::Arguments;

use fluke_abi::code::Status;
use libfluke::println;

use crate::resume;
use pages::Pages;

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

fn test(checks: &mut Checks) -> Result<(), Status> {
    let pages = Pages::new()?;
    table::test(pages, checks)?;
    checks.that(pages.odd() == 0, format_args!("faults that make no sense"));
    Ok(())
}

/// The program.
pub fn main() -> u64 {
    resume::install();
    let mut checks = Checks::default();
    if let Err(status) = test(&mut checks) {
        println!("faults: cannot begin: {status:?}");
        return crate::FAILED;
    }
    println!("faults: {} checks, {} failed", checks.done, checks.failed);
    if checks.failed == 0 { 0 } else { crate::FAILED }
}
