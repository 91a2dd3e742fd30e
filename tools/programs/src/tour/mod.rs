//! A narrated self-check of the kernel. Each line says what was expected and what was seen; one
//! that differs makes the whole run fail.

mod child;
mod cpus;
mod paging;
mod rpcs;
mod server;
mod sync;
mod transfer;

use core::fmt::{Arguments, Debug};

use libfluke::{println, startup};

/// The checks so far.
struct Checks {
    made: u64,
    failed: u64,
}

impl Checks {
    /// Prints a section's heading.
    fn section(&self, title: &str) {
        println!();
        println!("{title}");
    }

    /// Compares what was seen with what was expected, and says so.
    fn equal<T: PartialEq + Debug>(&mut self, what: Arguments<'_>, expected: &T, seen: &T) {
        self.made += 1;
        if expected == seen {
            println!("  ok      {what}: expected {expected:?}, saw {seen:?}");
        } else {
            self.failed += 1;
            println!("  FAILED  {what}: expected {expected:?}, saw {seen:?}");
        }
    }
}

/// Why a section could not be carried through.
type Trouble = libfluke::space::Error;

/// The program; the same program is its own child.
pub fn main() -> u64 {
    if startup::args().nth(1) == Some("child") {
        return child::main();
    }
    let mut checks = Checks { made: 0, failed: 0 };
    println!("A tour of the Fluke kernel, on {} CPUs.", startup::cpus());
    if let Err(trouble) = all(&mut checks) {
        checks.failed += 1;
        println!("  FAILED  the tour cannot go on: {trouble}");
    }
    println!();
    println!("tour: {} checks, {} failed", checks.made, checks.failed);
    if checks.failed == 0 { 0 } else { crate::FAILED }
}

fn all(checks: &mut Checks) -> Result<(), Trouble> {
    checks.section("CPUs: one thread for each of them, until each CPU has run one.");
    cpus::tour(checks)?;
    checks.section("Mutex and condition variable: two threads hand a token back and forth.");
    sync::tour(checks)?;
    checks.section("RPC between two spaces: a child, made of this program's memory, answers.");
    let server = server::start()?;
    let child = child::start(server)?;
    rpcs::tour(checks)?;
    checks.section("Demand paging: memory that a thread of this program provides when touched.");
    paging::tour(checks, server)?;
    checks.section("Atomic calls: a sender is stopped in the middle of a message, destroyed,");
    println!("made again from its state, and the message arrives whole.");
    transfer::tour(checks)?;
    child.destroy();
    Ok(())
}
