//! `flukevm verify`, through the library and the command: a short campaign. Needs KVM.

use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use flukevm::config::{Configuration, Model, Preempt};
use flukevm::verify::{Cell, Findings, Job, Plan, Progress, Verification, scenes, verify};

/// Counts.
#[derive(Default)]
struct Watch {
    begun: AtomicU64,
    points: AtomicU64,
    done: AtomicU64,
}

impl Progress for Watch {
    fn begins(&self, _: &Cell, points: u64) {
        self.begun.fetch_add(points, Ordering::Relaxed);
    }

    fn point(&self) {
        self.points.fetch_add(1, Ordering::Relaxed);
    }

    fn done(&self, findings: &Findings) {
        self.done.fetch_add(findings.points, Ordering::Relaxed);
    }
}

/// So many points of each cell, or all.
fn plan(budget: Option<u64>) -> Plan {
    Plan {
        stride: 1,
        budget,
        seed: 1,
        delay_stride: 64,
        play_all: false,
        into: None,
    }
}

/// Looks at them.
fn campaign(cells: Vec<Cell>, plan: Plan) -> Verification {
    let watch = Watch::default();
    let verification = verify(&Job {
        cells,
        plan,
        jobs: 2,
        progress: &watch,
    })
    .unwrap();
    assert!(verification.holds(), "{}", verification.text());
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    assert_eq!(count(&watch.begun), count(&watch.points));
    let points: u64 = verification.cells.iter().map(|cell| cell.points).sum();
    assert_eq!(count(&watch.done), points);
    verification
}

fn cell(scene: &str, configuration: Configuration, vcpus: u32) -> Cell {
    Cell {
        scene: scene.into(),
        configuration,
        vcpus,
    }
}

#[test]
fn all_scenes_in_one_configuration_or_another() {
    let configurations = Configuration::ALL.into_iter().cycle();
    let cells: Vec<_> = scenes()
        .unwrap()
        .iter()
        .zip(configurations)
        .map(|(scene, configuration)| cell(scene, configuration, 1))
        .collect();
    let long = cells.iter().filter(|cell| cell.scene.starts_with("ipc_"));
    assert!(long.count() >= 22, "all message transfers that sleep");
    let found = campaign(cells, plan(Some(4)));
    for cell in &found.cells {
        assert!(cell.run + cell.missed == 4, "{}", found.text());
        assert!(
            cell.missed < 3 && !cell.states.is_empty(),
            "{}",
            found.text()
        );
    }
}

#[test]
fn several_cpus_in_turn() {
    let cells = Configuration::ALL.into_iter().zip([
        ("mutex_lock", 2),
        ("ipc_call", 4),
        ("cond_wait", 4),
        ("ipc_server_ack_send_over_receive", 2),
        ("task_destroy", 4),
    ]);
    let cells = cells.map(|(kernel, (scene, vcpus))| cell(scene, kernel, vcpus));
    let found = campaign(cells.collect(), plan(Some(3)));
    let run: u64 = found.cells.iter().map(|cell| cell.run).sum();
    assert!(run > 8, "{}", found.text());
}

/// Taken apart in one kernel, put together in another.
#[test]
fn in_another_kernel() {
    let scenes = ["cond_wait", "ipc_client_connect_send_over_receive-long"];
    let kernels = Configuration::ALL.into_iter();
    for (from, into) in kernels.clone().zip(kernels.cycle().skip(2)).take(3) {
        let cells = scenes.map(|scene| cell(scene, from, 1));
        let found = campaign(
            cells.into(),
            Plan {
                delay_stride: 0,
                into: Some(into),
                ..plan(Some(2))
            },
        );
        let run: u64 = found.cells.iter().map(|cell| cell.run).sum();
        assert!(run >= 3, "{}", found.text());
        assert!(found.text().contains(&format!("2 cells into {into}, ")));
    }
}

/// Both models show the same states at all points, and a thread that sleeps is about to make the call.
#[test]
fn every_point_of_a_call_in_both_models() {
    let cells = [Model::Process, Model::Interrupt].map(|model| {
        let kernel = Configuration::new(model, Preempt::None).unwrap();
        cell("mutex_lock", kernel, 1)
    });
    let found = campaign(cells.into(), plan(None));
    for cell in &found.cells {
        assert_eq!(cell.run + cell.missed, cell.points, "{}", found.text());
        assert!(cell.same > cell.points / 2, "{}", found.text());
        assert!(
            cell.states
                .iter()
                .any(|state| state.entry == Some("mutex_lock"))
        );
        assert!(cell.states.iter().any(|state| state.entry.is_none()));
    }
}

/// It takes the kernel mutex for the first time where it has its effect: nobody may see it done before.
#[test]
fn every_point_of_an_alert_under_full_preemption() {
    let kernel = Configuration::new(Model::Process, Preempt::Full).unwrap();
    let found = campaign([cell("ipc_client_alert", kernel, 1)].into(), plan(None));
    for cell in &found.cells {
        assert_eq!(cell.run + cell.missed, cell.points, "{}", found.text());
    }
}

fn command(args: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_flukevm-under-test"))
        .args(args)
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8(bytes.into()).unwrap();
    (
        output.status.code().unwrap(),
        text(&output.stdout),
        text(&output.stderr),
    )
}

#[test]
fn the_command() {
    let one = [
        "verify",
        "mutex_lock",
        "--model",
        "interrupt",
        "--preempt",
        "none",
    ];
    let with = |more: &[&'static str]| command(&[&one[..], more].concat());

    let (status, out, _) = with(&["--budget", "5", "--json"]);
    let found: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((status, &found["cells"][0]["run"]), (0, &5.into()), "{out}");

    let (status, out, _) = with(&["--replay", "1:500"]);
    assert_eq!(status, 0, "{out}");
    assert!(
        out.contains("mutex_lock") && out.contains("as undisturbed"),
        "{out}"
    );

    for (args, expected) in [
        (
            with(&["--replay", "1:7000000"]),
            "has no point 7000000; give one from 1 to",
        ),
        (with(&["--replay", "1"]), "`1` is not SEED:POINT"),
        (with(&["--shard", "3/2"]), "`3/2` is not I/N"),
        (
            with(&["--stride", "0"]),
            "invalid value '0' for '--stride <N>'",
        ),
        (
            with(&["--into", "interrupt-fp"]),
            "there are process-np, process-pp, process-fp, interrupt-np, interrupt-pp",
        ),
        (
            with(&["--into", "process-np", "--vcpus", "2"]),
            "a second machine is for scenes on one vCPU",
        ),
        (
            command(&["verify", "nothing"]),
            "there is no scene `nothing`",
        ),
        (
            command(&["verify", "--model", "interrupt", "--preempt", "full"]),
            "--preempt full cannot go with --model interrupt",
        ),
        (
            command(&["verify", "mutex_lock", "--replay", "1:1"]),
            "one point is of one cell",
        ),
    ] {
        let (status, out, err) = args;
        assert_eq!((status, out.as_str()), (2, ""), "{err}");
        assert!(err.contains(expected) && err.lines().count() == 1, "{err}");
    }
}
