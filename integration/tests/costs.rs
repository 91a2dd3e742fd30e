//! What the kernel costs where it does least, in CPL 0 instructions, which are the same in each run. A change that
//! makes one of them dearer than it may be fails here; the table is printed.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

/// Level partial is the image and the path of level none.
const CONFIGURATIONS: [(&str, &str); 3] = [
    ("process", "none"),
    ("process", "full"),
    ("interrupt", "none"),
];

/// What is measured.
const COSTS: [&str; 7] = [
    "null entry point",
    "mutex_lock",
    "mutex_unlock",
    "null RPC between spaces",
    "RPC of two words",
    "soft fault",
    "context switch",
];

/// Most instructions of each, in the order of [`COSTS`]: at preemption level none, and at level full.
const MOST: [[u64; 7]; 2] = [
    [45, 270, 300, 920, 1030, 590, 140],
    [45, 350, 390, 1000, 1120, 600, 150],
];

/// A run of the program `costs`.
struct Run {
    /// The median of each kind of visit of the kernel.
    medians: BTreeMap<String, u64>,
    /// How many there were.
    visits: BTreeMap<String, u64>,
    stacks: Vec<(String, u64)>,
}

fn run(model: &str, preempt: &str, cases: &[&str]) -> Run {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("p.folded");
    let output = Command::new(env!("CARGO_BIN_EXE_flukevm-under-test"))
        .args(["run", "--model", model, "--preempt", preempt, "--json"])
        .arg("--profile")
        .arg(&path)
        .arg("costs")
        .args(cases)
        .env_remove("FLUKEVM_LOG")
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    let result: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let rows = result["counts"].as_array().unwrap();
    let column = |name: &str| {
        let row = |row: &serde_json::Value| {
            let entry = row["entry"].as_str().unwrap().to_string();
            (entry, row[name].as_u64().unwrap())
        };
        rows.iter().map(row).collect()
    };
    let folded = fs::read_to_string(path).unwrap();
    let stack = |line: &str| {
        let (stack, count) = line.rsplit_once(' ').unwrap();
        (stack.to_string(), count.parse().unwrap())
    };
    Run {
        medians: column("median"),
        visits: column("visits"),
        stacks: folded.lines().map(stack).collect(),
    }
}

/// Instructions from where a thread makes way to where another goes on, in a request, in which one does so once.
fn context_switch(run: &Run) -> u64 {
    let switches = |stack: &str| {
        let mut functions = stack.split(';');
        functions.next() == Some("ipc_call")
            && functions.any(|function| {
                matches!(function, "boundary::park" | "boundary::schedule")
                    || function.starts_with("model::")
            })
            && functions.all(|function| function != "boundary::run")
    };
    let counted = run.stacks.iter().filter(|(stack, _)| switches(stack));
    counted.map(|(_, count)| count).sum::<u64>() / run.visits["ipc_call"]
}

#[test]
fn nothing_has_become_dearer() {
    let mut table = String::new();
    let mut dear = Vec::new();
    for (model, preempt) in CONFIGURATIONS {
        let calls = run(model, preempt, &["null", "mutex", "rpc"]);
        let null = run(model, preempt, &["nullrpc"]);
        let pieces = run(model, preempt, &["pieces"]);
        let faults = run(model, preempt, &["fault"]);
        let costs = [
            calls.medians["thread_self"],
            calls.medians["mutex_lock"],
            calls.medians["mutex_unlock"],
            null.medians["ipc_call"] + null.medians["ipc_reply_wait_receive"],
            calls.medians["ipc_call"] + calls.medians["ipc_reply_wait_receive"],
            faults.medians["page fault"],
            context_switch(&pieces),
        ];
        let most = MOST[usize::from(preempt == "full")];
        for ((what, cost), most) in COSTS.iter().zip(costs).zip(most) {
            // The kernels of a debug build check their locks.
            let most = if cfg!(debug_assertions) {
                most * 4 / 3
            } else {
                most
            };
            table += &format!("{model:9} {preempt:7} {what:24} {cost:6}\n");
            if cost > most {
                dear.push(format!("{model} {preempt}: {what}: {cost}, may be {most}"));
            }
        }
    }
    println!("{table}");
    assert!(dear.is_empty(), "{dear:#?}");
}
