//! Checkpoints by the user-mode checkpointer: how long they take, and how large they are.

use std::fs;
use std::path::Path;

use crate::bench::model::{Measure, Table};
use crate::bench::run::interleaved;
use crate::bench::{Bench, Tabulate};
use crate::checkpoint::{self, Checkpoints};
use crate::config::{Configuration, VmConfig};
use crate::error::Error;
use crate::stop::StopReason;
use crate::vm::{Outcome, Vm};

/// The program that is written to a file: its threads sleep in every kind of call, and it asks for it once.
const PROGRAM: &str = "colony";

/// The table.
pub struct Checkpoint;

/// What came of one round.
struct Round {
    without: f64,
    with: f64,
    restored: f64,
    bytes: f64,
}

impl Tabulate for Checkpoint {
    fn id(&self) -> &'static str {
        "checkpoint"
    }

    fn title(&self) -> &'static str {
        "a checkpoint of a program whose threads sleep in every kind of call"
    }

    fn measure(&self, bench: &Bench<'_>, table: &mut Table) -> Result<(), Error> {
        let settings = bench.settings();
        let rounds = settings.reps.min(if settings.quick { 1 } else { 5 });
        let mut columns = bench.columns();
        if settings.quick {
            // A minute less.
            columns.truncate(1);
        }
        let found = interleaved(&columns, rounds, settings.seed, |column, _| {
            (bench.progress)(&format!("a checkpoint in {}", column.name));
            round(column.configuration)
        })?;
        for (column, rounds) in &found {
            let mut add = |row: &str, measure, value: fn(&Round) -> f64| {
                let samples = rounds.iter().map(value).collect();
                table
                    .cells
                    .push(bench.cell(row, &column.name, measure, samples));
            };
            add("the program alone", Measure::Microseconds, |round| {
                round.without
            });
            add("with a checkpoint", Measure::Microseconds, |round| {
                round.with
            });
            add("taken, and put back", Measure::Microseconds, |round| {
                round.with - round.without
            });
            add("restored, to the end", Measure::Microseconds, |round| {
                round.restored
            });
            add("the file", Measure::Bytes, |round| round.bytes);
        }
        table.notes.push(
            "Wall time from the first user-mode instruction to the machine's end. A checkpoint proves itself: when the file is written, the \
             program is unmade, and what goes on is what was read back; so what a checkpoint adds to the program is taking it, writing it, \
             reading it and making it again. Restored: a new machine, from the file to the program's end."
                .into(),
        );
        Ok(())
    }
}

fn round(configuration: Configuration) -> Result<Round, Error> {
    let directory = tempfile::tempdir().map_err(Error::host("making a directory"))?;
    let to = directory.path().join("checkpoint");
    let checkpoints = Checkpoints {
        to: &to,
        after: None,
    };
    let without = run(VmConfig::fluke(configuration, PROGRAM, &[])?)?;
    let with = run(checkpoint::run(
        configuration,
        PROGRAM,
        &[],
        Vec::new(),
        &checkpoints,
    )?)?;
    let file = read(&to)?;
    let bytes = file.len() as f64;
    let restored = run(checkpoint::restore(configuration, PROGRAM, file, None)?)?;
    let [without, with, restored] = [without, with, restored].map(|outcome| wall(&outcome));
    Ok(Round {
        without,
        with,
        restored,
        bytes,
    })
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    fs::read(path).map_err(|source| Error::File {
        path: path.into(),
        source,
    })
}

/// From the first user-mode instruction to the end, microseconds.
fn wall(outcome: &Outcome) -> f64 {
    let first = outcome.time_to_first_user.unwrap_or_default();
    outcome.elapsed.saturating_sub(first).as_secs_f64() * 1e6
}

fn run(config: VmConfig) -> Result<Outcome, Error> {
    let outcome = Vm::new(config)?.run()?;
    match &outcome.stop {
        StopReason::Exited(0) => Ok(outcome),
        stop => Err(Error::Control(format!("{PROGRAM}: {stop}"))),
    }
}
