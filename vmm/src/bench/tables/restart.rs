//! Table 3: what a fault in the middle of a reliable request costs: to remedy it, and to do again what was thrown away.

use super::applications::Found;
use crate::bench::model::{Cell, Measure, Table};
use crate::bench::{Bench, Tabulate, samples_of};
use crate::error::Error;
use fluke_abi::probe::Probe;

/// The table.
pub struct Restart;

/// Rows, and the pieces of `flukeperf` they are made of.
pub const CASES: [(&str, &str); 4] = [
    ("client, soft", "restart-client-soft"),
    ("client, hard", "restart-client-hard"),
    ("server, soft", "restart-server-soft"),
    ("server, hard", "restart-server-hard"),
];

/// The piece without a fault.
const NONE: &str = "restart-none";

impl Tabulate for Restart {
    fn id(&self) -> &'static str {
        "3"
    }

    fn title(&self) -> &'static str {
        "a fault in ipc_client_connect_send_over_receive: to remedy it, and to roll back (OSDI '99 table 3)"
    }

    fn measure(&self, bench: &Bench<'_>, table: &mut Table) -> Result<(), Error> {
        for (row, name) in CASES {
            for found in bench.application("flukeperf")? {
                let column = &found.column.name;
                counted(bench, table, row, name, found);
                let middle = |name: &str| {
                    let cell =
                        bench.cell(row, column, Measure::Cycles, samples_of(&found.runs, name));
                    cell.summary.map(|summary| summary.median)
                };
                let cycles = match (middle(name), middle(NONE)) {
                    (Some(_), Some(without)) => samples_of(&found.runs, name)
                        .into_iter()
                        .map(|with| with - without)
                        .collect(),
                    _ => Vec::new(),
                };
                let row = format!("{row}: both");
                table
                    .cells
                    .push(bench.cell(&row, column, Measure::Cycles, cycles));
            }
        }
        table.notes.push(
            "The message has 64 words; the missing page is the one that the client's message lies in, or the server's buffer. Soft: the page is \
             found further up in the hierarchy; hard: a memory manager in user mode, another thread, maps it. The instructions of a request \
             with the fault are compared one by one with those of one without. Roll-back is what had been executed when the fault was \
             found since the last instruction that wrote progress down, and was thrown away; remedy is all else that the request with the fault \
             executes more. A soft fault after which the kernel goes on where it was throws nothing away. Cycles are both together."
                .into(),
        );
        Ok(())
    }
}

fn counted(bench: &Bench<'_>, table: &mut Table, row: &str, name: &str, found: &Found) {
    let column = &found.column.name;
    let rows = [
        (format!("{row}: remedy"), Measure::Instructions),
        (format!("{row}: roll-back"), Measure::Instructions),
        (format!("{row}: roll-back of remedy"), Measure::Percent),
    ];
    let Some(counted) = &found.counted else {
        let why = bench.uncountable().unwrap_or("it was not counted");
        for (row, measure) in rows {
            table.cells.push(Cell::missing(&row, column, measure, why));
        }
        return;
    };
    let piece = |name: &str| counted.pieces.iter().find(|piece| piece.name == name);
    let commits = |address| {
        matches!(
            counted.code.probe(address),
            Some(Probe::Enter | Probe::Commit | Probe::Exit)
        ) || address == counted.code.ways.trap
            || address == counted.code.ways.syscall
    };
    let unwinds = |address| counted.code.probe(address) == Some(Probe::HardFault);
    let costs = match (piece(name), piece(NONE)) {
        (Some(with), Some(without)) => costs(&without.addresses, &with.addresses, unwinds, commits),
        _ => None,
    };
    let Some((remedy, rollback)) = costs else {
        for (row, measure) in rows {
            let why = "the request did not fault where it was to";
            table.cells.push(Cell::missing(&row, column, measure, why));
        }
        return;
    };
    let values = [
        remedy as f64,
        rollback as f64,
        100.0 * rollback as f64 / remedy.max(1) as f64,
    ];
    for ((row, measure), value) in rows.into_iter().zip(values) {
        table
            .cells
            .push(bench.cell(&row, column, measure, vec![value]));
    }
}

/// Instructions to remedy a fault, and those thrown away; none if there was no fault. `unwinds`: an instruction after which
/// the call is made anew; `commits`: one from which it is.
fn costs(
    without: &[u64],
    with: &[u64],
    unwinds: impl Fn(u64) -> bool,
    commits: impl Fn(u64) -> bool,
) -> Option<(u64, u64)> {
    let more = with.len().checked_sub(without.len());
    let more = more.filter(|&more| more > 0)?;
    if !with.iter().any(|&address| unwinds(address)) {
        // It goes on where it was.
        return Some((more as u64, 0));
    }
    let pairs = without.iter().zip(with);
    let before = pairs.take_while(|(a, b)| a == b).count();
    let last = with[..before].iter().rposition(|&address| commits(address));
    let thrown = before - last.unwrap_or(0);
    Some((more.saturating_sub(thrown) as u64, thrown as u64))
}

#[cfg(test)]
mod tests {
    /// The instruction that writes progress down.
    const COMMIT: u64 = 10;

    /// The instruction that gives up.
    const UNWIND: u64 = 80;

    fn costs(without: &[u64], with: &[u64]) -> Option<(u64, u64)> {
        super::costs(
            without,
            with,
            |address| address == UNWIND,
            |address| address == COMMIT,
        )
    }

    #[test]
    fn a_fault_after_which_it_goes_on_costs_its_remedy() {
        assert_eq!(costs(&[10, 1, 2, 3], &[10, 1, 70, 71, 2, 3]), Some((2, 0)));
    }

    #[test]
    fn what_is_done_again_is_rolled_back() {
        // Found after 10, 1, 2; begins anew at 10.
        let with = [5, 10, 1, 2, 80, 81, 82, 10, 1, 2, 3];
        assert_eq!(costs(&[5, 10, 1, 2, 3], &with), Some((3, 3)));
    }

    #[test]
    fn without_a_fault_there_is_nothing_to_say() {
        assert_eq!(costs(&[10, 1, 2], &[10, 1, 2]), None);
    }
}
