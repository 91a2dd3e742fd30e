//! Tables 4 and 5: applications in each configuration. Their runs are also what the table of primitives is made of.

use std::collections::BTreeMap;

use crate::bench::code::Code;
use crate::bench::model::{Cell, Measure, Settings, Table};
use crate::bench::run::{Run, Workload, interleaved, once};
use crate::bench::trace::{Piece, per_operation, pieces};
use crate::bench::{Bench, Column, Tabulate};
use crate::error::Error;

/// Sources that `compile` reads.
const INPUTS: [(&str, &[u8]); 10] = [
    (
        "flatten",
        include_bytes!("../../../../benches/inputs/flatten.wgsl"),
    ),
    (
        "coarse",
        include_bytes!("../../../../benches/inputs/coarse.wgsl"),
    ),
    (
        "config",
        include_bytes!("../../../../benches/inputs/config.wgsl"),
    ),
    (
        "drawtag",
        include_bytes!("../../../../benches/inputs/drawtag.wgsl"),
    ),
    (
        "pathtag",
        include_bytes!("../../../../benches/inputs/pathtag.wgsl"),
    ),
    (
        "segment",
        include_bytes!("../../../../benches/inputs/segment.wgsl"),
    ),
    (
        "cubic",
        include_bytes!("../../../../benches/inputs/cubic.wgsl"),
    ),
    (
        "bump",
        include_bytes!("../../../../benches/inputs/bump.wgsl"),
    ),
    (
        "ptcl",
        include_bytes!("../../../../benches/inputs/ptcl.wgsl"),
    ),
    (
        "tile",
        include_bytes!("../../../../benches/inputs/tile.wgsl"),
    ),
];

/// Bytes that `memtest` touches where instructions are counted.
const COUNTED_BYTES: u64 = 16 * 4096;

/// Names of the applications, in the paper's order.
pub const NAMES: [&str; 3] = ["memtest", "flukeperf", "compile"];

/// What came of an application in a configuration.
#[derive(Debug)]
pub struct Found {
    /// The configuration.
    pub column: Column,
    /// Its runs.
    pub runs: Vec<Run>,
    /// What was counted, if that can be done here.
    pub counted: Option<Counted>,
}

/// What was counted.
#[derive(Clone, Debug)]
pub struct Counted {
    /// Instructions of one operation of each piece of work, by name.
    pub per_operation: BTreeMap<String, f64>,
    /// The pieces.
    pub pieces: Vec<Piece>,
    /// What ran.
    pub code: Code,
}

/// What tells a program to have its work counted. A quick run counts less often; what the clock brings is then more
/// often in all.
pub fn counting(settings: &Settings) -> String {
    if settings.quick { "count=2" } else { "count" }.into()
}

/// An application, to be timed or to be counted.
pub fn workload(bench: &Bench<'_>, name: &'static str, counted: bool) -> Workload {
    let settings = bench.settings();
    let mut args = Vec::new();
    if counted {
        args.push(counting(settings));
    } else {
        args.push(format!("batches={}", settings.batches));
        args.push(format!("scale={}", settings.scale));
    }
    if name == "flukeperf" && !settings.only.is_empty() {
        args.push(format!("only={}", settings.only));
    }
    if name == "memtest" {
        let bytes = if counted {
            COUNTED_BYTES
        } else {
            settings.memtest_bytes
        };
        args.push(format!("bytes={bytes}"));
        if !counted {
            // One pass is long enough.
            args[0] = "batches=1".into();
        }
    }
    let mut workload = Workload::new(name, &args);
    if name == "compile" {
        workload.files = INPUTS.to_vec();
    }
    workload
}

/// Runs an application in all configurations, in turn; and counts, where that can be done.
///
/// # Errors
/// If it fails.
pub fn measure(bench: &Bench<'_>, name: &'static str) -> Result<Vec<Found>, Error> {
    let columns = bench.columns();
    let settings = bench.settings();
    let timed = workload(bench, name, false);
    let runs = interleaved(&columns, settings.reps, settings.seed, |column, round| {
        (bench.progress)(&format!(
            "{name}, round {} of {}: {}",
            round + 1,
            settings.reps,
            column.name
        ));
        once(&timed, column)
    })?;
    let mut counts = Vec::new();
    if bench.uncountable().is_none() {
        (bench.progress)(&format!("{name}: counting instructions"));
        let counted = workload(bench, name, true);
        counts = bench.at_once(&columns, |column| {
            let (pieces, code) = pieces(&counted, column)?;
            Ok(Counted {
                per_operation: per_operation(&pieces),
                pieces,
                code,
            })
        })?;
    }
    let counts = counts.into_iter().map(|(_, counted)| Some(counted));
    let counts = counts.chain(std::iter::repeat_with(|| None));
    let found = runs.into_iter().zip(counts);
    Ok(found
        .map(|((column, runs), counted)| Found {
            column,
            runs,
            counted,
        })
        .collect())
}

/// Table 5.
pub struct Table5;

impl Tabulate for Table5 {
    fn id(&self) -> &'static str {
        "5"
    }

    fn title(&self) -> &'static str {
        "applications in each configuration, against Process NP (OSDI '99 tables 4 and 5)"
    }

    fn measure(&self, bench: &Bench<'_>, table: &mut Table) -> Result<(), Error> {
        for name in NAMES {
            for Found {
                column,
                runs,
                counted,
            } in bench.application(name)?
            {
                let cell = |measure, samples| bench.cell(name, &column.name, measure, samples);
                let cycles = runs.iter().map(|run| run.total).collect();
                table.cells.push(cell(Measure::Cycles, cycles));
                let wall = runs
                    .iter()
                    .map(|run| run.wall.as_secs_f64() * 1e6)
                    .collect();
                table.cells.push(cell(Measure::Microseconds, wall));
                table.cells.push(match (counted, bench.uncountable()) {
                    (Some(counted), _) => {
                        let sum = counted.per_operation.values().sum();
                        cell(Measure::Instructions, vec![sum])
                    }
                    (None, why) => Cell::missing(
                        name,
                        &column.name,
                        Measure::Instructions,
                        why.unwrap_or_default(),
                    ),
                });
            }
        }
        table.notes = notes(bench)?;
        Ok(())
    }
}

fn notes(bench: &Bench<'_>) -> Result<Vec<String>, Error> {
    let first = |name| {
        Ok::<_, Error>(
            bench
                .application(name)?
                .first()
                .and_then(|found| found.runs.first()),
        )
    };
    let mut notes = Vec::new();
    if let Some(run) = first("memtest")? {
        notes.push(format!(
            "memtest touches {} KiB one byte at a time, in a space whose memory manager in another space provides it \
             page by page: {} hard faults. Instructions are those of one page.",
            bench.settings().memtest_bytes >> 10,
            run.figures.get("faults").copied().unwrap_or(0)
        ));
    }
    if let Some(run) = first("flukeperf")? {
        notes.push(format!(
            "flukeperf is {} pieces of work, each as often as this table's settings say (the table `primitives` lists \
             them); the longest message has 1 MiB. Instructions are the sum of one operation of each. In this run it made {} \
             calls and {} context switches.",
            run.order.len(),
            run.kernel.calls,
            run.kernel.context_switches
        ));
    }
    if let Some(run) = first("compile")? {
        notes.push(format!(
            "compile is naga, the shader compiler of wgpu, which translates two shaders of Vello with their imports to {} \
             words of SPIR-V; it reads from and writes to a file server in another space.",
            run.figures.get("words").copied().unwrap_or(0)
        ));
    }
    notes.push(
        "Cycles are the sum of what the program measured itself; wall time is the machine's from the first user-mode \
         instruction to its end, with all that the program does besides."
            .into(),
    );
    Ok(notes)
}
