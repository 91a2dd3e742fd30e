//! Hard and soft faults.

use core::sync::atomic::Ordering::Relaxed;

use fluke_abi::layout::PAGE_SIZE;
use libfluke::space::READ_WRITE;
use libfluke::{rpc, startup};

use super::child::{READ, VIEW, sum};
use super::server::{self, HARD_FAULTS, PAGES, PROVIDED};
use super::{Checks, Trouble};

pub fn tour(checks: &mut Checks, server: server::Handle) -> Result<(), Trouble> {
    let size = PAGES * PAGE_SIZE;
    let here = &startup::startup().space;
    server
        .demand
        .map(server::demand_start(), size, READ_WRITE, here, VIEW)?;
    let counts = || (HARD_FAULTS.load(Relaxed), PROVIDED.load(Relaxed));
    checks.equal(
        format_args!("(hard faults, pages) before the first touch"),
        &(0, 0),
        &counts(),
    );

    for page in 0..PAGES {
        // SAFETY: mapped above, and used by nothing else.
        unsafe { ((VIEW + page * PAGE_SIZE) as *mut u64).write_volatile(page * 3 + 1) };
    }
    let all = (PAGES, PAGES);
    checks.equal(
        format_args!("the same after writing {PAGES} pages"),
        &all,
        &counts(),
    );

    let expected = (0..PAGES).map(|page| page * 3 + 1).sum::<u64>();
    checks.equal(
        format_args!("sum of what was written"),
        &expected,
        &sum(PAGES),
    );
    checks.equal(
        format_args!("hard faults after reading it again"),
        &all,
        &counts(),
    );

    let mut reply = [0; 2];
    let asked = rpc::rpc(server::child_port(), &[READ, PAGES], &[], &mut reply);
    checks.equal(
        format_args!("the same sum, read by the child"),
        &(Ok(1), expected),
        &(asked, reply[0]),
    );
    checks.equal(
        format_args!("hard faults after that: the child's faults were soft"),
        &all,
        &counts(),
    );
    Ok(())
}
