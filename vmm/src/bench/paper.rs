//! The paper's figures: Ford, Hibler, Lepreau, McGrath, Tullmann, *Interface and Execution Models in the Fluke Kernel*,
//! OSDI '99. None of them was measured here.

use super::model::{Published, Table};

/// The paper's configurations as they are called here, in the order of its tables.
const CONFIGURATIONS: [&str; 5] = [
    "process-np",
    "process-pp",
    "process-fp",
    "interrupt-np",
    "interrupt-pp",
];

/// Table 5: run time against Process NP. Of Process NP, milliseconds on a 200 MHz Pentium Pro.
const APPLICATIONS: [(&str, [&str; 5]); 3] = [
    (
        "memtest",
        ["1.00 (2884 ms)", "1.00", "1.11", "1.00", "1.00"],
    ),
    (
        "flukeperf",
        ["1.00 (7120 ms)", "1.01", "1.20", "0.94", "0.94"],
    ),
    (
        "compile",
        ["1.00 (7150 ms, gcc)", "1.03", "1.05", "1.03", "1.03"],
    ),
];

/// Table 3: remedy and roll-back, microseconds, and their ratio, of Process NP on a 200 MHz Pentium Pro.
const RESTARTS: [(&str, &str, &str, &str); 4] = [
    ("client, soft", "18.9 us", "none", "0"),
    ("client, hard", "118 us", "2.2 us", "1.9 %"),
    ("server, soft", "29.3 us", "2.5 us", "8.5 %"),
    ("server, hard", "135 us", "6.8 us", "5.0 %"),
];

/// Table 6: microseconds, and times.
const LATENCY: [(&str, [&str; 5]); 4] = [
    (
        "average",
        ["28.9 us", "18.0 us", "5.14 us", "30.4 us", "18.7 us"],
    ),
    (
        "maximum",
        ["7430 us", "1200 us", "19.6 us", "7356 us", "1272 us"],
    ),
    ("runs", ["7594", "7805", "9212", "7348", "7531"]),
    ("misses", ["132", "5", "0", "141", "7"]),
];

/// Table 7: bytes of the TCB, of the stack, and both.
const MEMORY: [(&str, &str, &str, &str); 8] = [
    ("FreeBSD, process", "2132", "6700", "8832"),
    ("Linux, process", "2395", "4096", "6491"),
    ("Mach, process", "452", "4022", "4474"),
    ("Mach, interrupt", "690", "-", "690"),
    ("L3, process", "1024, both", "", "1024"),
    ("Fluke, process", "4096, both", "", "4096"),
    ("Fluke, process, production", "1024, both", "", "1024"),
    ("Fluke, interrupt", "300", "-", "300"),
];

/// Adds what the paper says to a table.
pub fn fill(table: &mut Table) {
    let difference = match table.id.as_str() {
        "3" => {
            for (row, remedy, rollback, ratio) in RESTARTS {
                row_of(
                    table,
                    row,
                    &["remedy", "roll-back", "ratio"],
                    &[remedy, rollback, ratio],
                );
            }
            "Here soft faults of either side are remedied where they are found, so neither throws anything away; and the memory manager is \
                 a thread in the same space, where the paper does not say where its was."
        }
        "5" => {
            for (row, values) in APPLICATIONS {
                row_of(table, row, &CONFIGURATIONS, &values);
            }
            "The paper's flukeperf is lost, so ours is another selection of the same primitives, and its gcc is replaced by another compiler; \
                 where kernel code is emulated its instructions cost far more than a program's, so memtest and flukeperf are all kernel \
                 there, and a copy is as slow as its words."
        }
        "5.5" => {
            row_of(
                table,
                "fastest call",
                &["entry and exit", "copying the frame"],
                &["70 cycles", "6 cycles"],
            );
            "Two stages of a copy are as many instructions here as there: what they cost beside the rest is small where the kernel runs on hardware, and \
                 their share of the instructions where each is emulated. With RSP0 pointing into the thread there is no bias to pay for."
        }
        "6" => {
            for (row, values) in LATENCY {
                row_of(table, row, &CONFIGURATIONS, &values);
            }
            "The paper's thread runs in the kernel every 1 ms, ours in user mode, so that a switch and a return to user mode are part of it; on hosts that emulate \
                 kernel code a switch alone takes about that long, and the interval is longer."
        }
        "7" => {
            for (row, tcb, stack, all) in MEMORY {
                row_of(table, row, &["TCB", "stack", "in all"], &[tcb, stack, all]);
            }
            "Ours are 64-bit: registers and links are twice as long, and each thread has 512 bytes of SSE registers; stacks have a size for the \
                 deepest use with debugging aids."
        }
        _ => return,
    };
    table.difference = Some(difference.into());
}

fn row_of(table: &mut Table, row: &str, columns: &[&str], values: &[&str]) {
    for (column, text) in columns.iter().zip(values) {
        table.published.push(Published {
            row: row.into(),
            column: (*column).into(),
            text: (*text).into(),
        });
    }
}
