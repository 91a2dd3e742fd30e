//! `flukevm bench`, through the command and the library: little work, all the way. Needs KVM.

use std::fs;
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;

use flukevm::config::Configuration;
use flukevm::doctor::{self, Cpl0};

fn bench(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flukevm-under-test"));
    command.arg("bench").args(args).env_remove("FLUKEVM_LOG");
    command.output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The values of a table in a report, by row, column and measure.
fn cells<'r>(report: &'r Value, id: &str) -> Vec<(&'r str, &'r str, &'r str, &'r Value)> {
    let tables = report["tables"].as_array().unwrap();
    let table = tables.iter().find(|table| table["id"] == id).unwrap();
    let cells = table["cells"].as_array().unwrap();
    let word = |cell: &'r Value, name: &str| cell[name].as_str().unwrap();
    cells
        .iter()
        .map(|cell| {
            let names = ["row", "column", "measure"].map(|name| word(cell, name));
            (names[0], names[1], names[2], cell)
        })
        .collect()
}

#[test]
fn every_configuration_has_every_measure_and_is_like_itself() {
    let directory = TempDir::new().unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    let (saved, csv, html) = (path("r.json"), path("r.csv"), path("r.html"));
    let small = ["primitives", "--only", "mutex_t"];
    let mut args = small.to_vec();
    args.extend(["--reps", "1", "--batches", "2", "--json"]);
    args.extend(["--save", &saved, "--csv", &csv, "--html", &html]);
    let output = bench(&args);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["schema"], 1);

    let emulated = doctor::probe().unwrap().cpl0 == Cpl0::Emulated;
    assert_eq!(report["host"]["kernel_code"] == "emulated", emulated);
    let cells = cells(&report, "primitives");
    for configuration in Configuration::ALL {
        let name = configuration.to_string();
        let value = |wanted: &str| {
            let found = cells.iter().find(|(row, column, measure, _)| {
                (*row, *column, *measure) == ("mutex_trylock_unlock", &name, wanted)
            });
            found.map(|(.., cell)| cell["summary"]["median"].as_f64())
        };
        let cycles = value("cycles").flatten().unwrap();
        assert!(cycles > 0.0, "{name}");
        let instructions = value("instructions").expect("a cell, even if nothing was counted");
        assert_eq!(instructions.is_some(), emulated, "{name}");
        // Two calls, none of which can be had for less.
        assert!(
            instructions.is_none_or(|count| count > 100.0),
            "{name}: {instructions:?}"
        );
        assert!(report["build"]["kernels"][&name].is_string(), "{name}");
    }
    assert!(fs::read_to_string(&csv).unwrap().lines().count() == cells.len() + 1);
    let page = fs::read_to_string(&html).unwrap();
    assert!(page.contains("<svg") && page.contains("mutex_trylock_unlock"));

    // Compared with itself.
    if emulated {
        let mut args = small.to_vec();
        args.extend(["--counts", "--compare", &saved]);
        let output = bench(&args);
        let said = text(&output.stdout);
        assert!(
            said.ends_with("5 values compared, 0 worse, 0 better\n"),
            "{said}"
        );
        assert_eq!(output.status.code(), Some(0));

        // Compared with one in which a call took half as much.
        let mut better = report.clone();
        for table in better["tables"].as_array_mut().unwrap() {
            for cell in table["cells"].as_array_mut().unwrap() {
                let summary = &mut cell["summary"];
                for name in ["median", "min", "max"] {
                    let value = summary[name].as_f64().unwrap();
                    summary[name] = (value / 2.0).into();
                }
                let ends = summary["interval"].as_array_mut().unwrap();
                for end in ends {
                    *end = (end.as_f64().unwrap() / 2.0).into();
                }
            }
        }
        fs::write(&saved, better.to_string()).unwrap();
        let output = bench(&args);
        let said = text(&output.stdout);
        assert!(said.contains("WORSE  +100.0 %  table primitives"), "{said}");
        assert_eq!(output.status.code(), Some(1));
    }
}

#[test]
fn misuse_is_refused() {
    let directory = TempDir::new().unwrap();
    let garbage = directory.path().join("garbage");
    fs::write(&garbage, "{\"schema\": 99}").unwrap();
    let garbage = garbage.display().to_string();
    for (args, why) in [
        (&["99"][..], "there is no table `99`; there are 1, "),
        (&["--memtest", "1"], "memtest touches 4 KiB to 64 MiB"),
        (
            &["--compare", "/nowhere/at/all"],
            "cannot read `/nowhere/at/all`",
        ),
        (&["--compare", &garbage], "a report of version 99, not 1"),
        (
            &["--model", "interrupt", "--preempt", "full"],
            "--preempt full cannot go with --model interrupt",
        ),
    ] {
        let output = bench(args);
        let said = text(&output.stderr);
        assert!(
            said.starts_with("error: ") && said.contains(why),
            "{args:?}: {said}"
        );
        assert_eq!(said.lines().count(), 1, "{said}");
        assert_eq!(output.status.code(), Some(2), "{args:?}");
    }
}

#[test]
fn the_tables_are_listed() {
    let output = bench(&["--list"]);
    let said = text(&output.stdout);
    for id in ["1", "3", "5", "6", "7", "primitives"] {
        let listed = said
            .lines()
            .any(|line| line.split_whitespace().next() == Some(id));
        assert!(listed, "{id}: {said}");
    }
}
