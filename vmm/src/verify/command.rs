//! `flukevm verify`.

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::thread::available_parallelism;
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::mutants::{self, Hunt, Verdicts};
use super::{Cell, Explorer, Findings, Job, Plan, Progress, Verification, scenes, verify};
use crate::config::{Configuration, Model, Preempt};
use crate::error::{Error, STATUS_FAILURE};

/// Points of each cell that a bug is looked for at, unless the user says otherwise.
const MUTANT_BUDGET: u64 = 128;

/// Arguments of the command.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Scenes to play; all, if left out. `--list` names them.
    scenes: Vec<String>,
    /// List the scenes.
    #[arg(long)]
    list: bool,
    /// Only kernels of that execution model.
    #[arg(long, value_enum)]
    model: Option<Model>,
    /// Only kernels of that preemption level.
    #[arg(long, value_enum, value_name = "LEVEL")]
    preempt: Option<Preempt>,
    /// Numbers of vCPUs, such as 1,2,4. Of several, which run in turn, the seed chooses the interleavings.
    #[arg(long, value_name = "N,...", default_value = "1", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=64))]
    vcpus: Vec<u32>,
    /// Look at every N-th point only.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    stride: u64,
    /// Look at no more than N points of each cell, chosen at random.
    #[arg(long, value_name = "N")]
    budget: Option<u64>,
    /// Of the choice of points.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Count the instructions until the state is taken at every N-th point looked at; 0 is never.
    #[arg(long, value_name = "N", default_value_t = 256)]
    delays: u64,
    /// Ring at every point and play on from there, even where interrupts are off, or the machine is in a state from
    /// which it was played on before.
    #[arg(long)]
    play_all: bool,
    /// Put the target together in a second machine, of that configuration; interrupt-np, for example. It takes about
    /// a second for each point.
    #[arg(long, value_name = "CONFIGURATION")]
    into: Option<Configuration>,
    /// Look at one point only, and show what there is to see: the seed, and the point's number.
    #[arg(long, value_name = "SEED:POINT", value_parser = replay)]
    replay: Option<(u64, u64)>,
    /// Look at the cells of one of several machines only: the I-th of N.
    #[arg(long, value_name = "I/N", value_parser = shard)]
    shard: Option<(usize, usize)>,
    /// Cells to look at at once; as many as the host has CPUs, if left out.
    #[arg(long, value_name = "N")]
    jobs: Option<NonZeroUsize>,
    /// Instead, see whether this would find bugs: give kernels one each, of those named or all there are, and look
    /// for it in the scenes that it concerns until something goes wrong. Needs a build with `--features mutants`.
    #[arg(long, value_name = "NAME", num_args = 0.., conflicts_with_all = ["replay", "shard", "junit", "into"])]
    mutants: Option<Vec<String>>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    /// Write what was found as JUnit XML, too.
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
}

fn pair<T: std::str::FromStr>(text: &str, by: char) -> Option<(T, T)> {
    let (first, second) = text.split_once(by)?;
    Some((first.parse().ok()?, second.parse().ok()?))
}

fn replay(text: &str) -> Result<(u64, u64), String> {
    pair(text, ':').ok_or_else(|| format!("`{text}` is not SEED:POINT; write for example 1:250"))
}

fn shard(text: &str) -> Result<(usize, usize), String> {
    pair(text, '/')
        .filter(|(i, n)| (1..=*n).contains(i))
        .ok_or_else(|| format!("`{text}` is not I/N; write for example 1/4"))
}

/// Runs the command; its exit status.
///
/// # Errors
/// If the arguments are wrong, or the host fails.
pub fn command(args: &VerifyArgs) -> Result<u8, Error> {
    let known = scenes()?;
    if args.list {
        known.iter().for_each(|scene| println!("{scene}"));
        return Ok(0);
    }
    if let Some(scene) = args.scenes.iter().find(|scene| !known.contains(scene)) {
        return Err(Error::Config(format!(
            "there is no scene `{scene}`; see `flukevm verify --list`"
        )));
    }
    let chosen = |configuration: &Configuration| {
        args.model
            .is_none_or(|model| model == configuration.model())
            && args
                .preempt
                .is_none_or(|preempt| preempt == configuration.preempt())
    };
    let configurations: Vec<_> = Configuration::ALL.into_iter().filter(chosen).collect();
    if let (Some(model), Some(preempt)) = (args.model, args.preempt) {
        Configuration::new(model, preempt)?;
    }
    let jobs = args
        .jobs
        .or_else(|| available_parallelism().ok())
        .map_or(1, NonZeroUsize::get);
    let plan = Plan {
        stride: args.stride,
        budget: args.budget,
        seed: args.seed,
        delay_stride: args.delays,
        play_all: args.play_all,
        into: args.into,
    };
    if let Some(names) = &args.mutants {
        let hunt = Hunt {
            mutants: mutants::named(names)?,
            scenes: args.scenes.clone(),
            configurations,
            plan: Plan {
                budget: args.budget.or(Some(MUTANT_BUDGET)),
                delay_stride: 0,
                ..plan
            },
            jobs,
        };
        let verdicts = mutants::hunt(&hunt)?;
        return print(args.json, &verdicts, Verdicts::text, Verdicts::holds);
    }
    let scenes = if args.scenes.is_empty() {
        &known
    } else {
        &args.scenes
    };
    let cells = scenes.iter().flat_map(|scene| {
        let configurations = configurations.iter();
        configurations.flat_map(move |&configuration| {
            args.vcpus.iter().map(move |&vcpus| Cell {
                scene: scene.clone(),
                configuration,
                vcpus,
            })
        })
    });
    if args.into.is_some() && args.vcpus != [1] {
        return Err(Error::Config(
            "a second machine is for scenes on one vCPU; leave out --vcpus or --into".into(),
        ));
    }
    // In another machine, too, who comes first is another matter.
    let in_order = |cell: &Cell| cell.vcpus == 1 && args.into.is_none();
    let cells = cells.filter(|cell| in_order(cell) || cell.is_for_several());
    let (shard, shards) = args.shard.unwrap_or((1, 1));
    let cells: Vec<_> = cells.skip(shard - 1).step_by(shards).collect();
    if let Some((seed, point)) = args.replay {
        let [cell] = &cells[..] else {
            return Err(Error::Config(
                "one point is of one cell; give one scene, --model, --preempt and one --vcpus with --replay"
                    .into(),
            ));
        };
        return show(cell, args.into, seed, point);
    }
    let watch = Watch::new(cells.len());
    let job = Job {
        cells,
        plan,
        jobs,
        progress: &watch,
    };
    let verification = verify(&job)?;
    watch.bar.finish_and_clear();
    if let Some(path) = &args.junit {
        fs::write(path, verification.junit()).map_err(|error| {
            Error::Config(format!(
                "cannot write `{}`: {error}; give the path of a file in a directory that you may write to",
                path.display()
            ))
        })?;
    }
    print(
        args.json,
        &verification,
        Verification::text,
        Verification::holds,
    )
}

/// Prints what was found; the exit status that says whether it is well.
fn print<T: Serialize>(
    json: bool,
    found: &T,
    text: fn(&T) -> String,
    holds: fn(&T) -> bool,
) -> Result<u8, Error> {
    let text = match json {
        true => {
            serde_json::to_string(found).map_err(|error| Error::Config(error.to_string()))? + "\n"
        }
        false => text(found),
    };
    // Whoever reads no more has seen enough.
    let _ = io::stdout().write_all(text.as_bytes());
    Ok(if holds(found) { 0 } else { STATUS_FAILURE })
}

/// One point.
fn show(cell: &Cell, into: Option<Configuration>, seed: u64, point: u64) -> Result<u8, Error> {
    let explorer = Explorer::new(cell.clone(), into).map_err(|unplayable| unplayable.of(cell))?;
    let (text, findings) = explorer.replay(seed, point)?;
    print!("{text}");
    for state in &findings.states {
        println!("extracted: {state:x?}");
    }
    for divergence in &findings.diverged {
        println!(
            "{cell}, point {point}, at {}: {}",
            divergence.place, divergence.what
        );
    }
    if findings.diverged.is_empty() {
        println!("{cell}, point {point}: as undisturbed");
        return Ok(0);
    }
    Ok(STATUS_FAILURE)
}

/// A progress bar on a terminal; a line for each cell elsewhere.
struct Watch {
    bar: ProgressBar,
    cells: usize,
    terminal: bool,
    counts: std::sync::Mutex<(usize, u64, u64)>,
}

impl Watch {
    fn new(cells: usize) -> Self {
        let style = ProgressStyle::with_template("{bar:30} {msg} {elapsed} of {duration}");
        let bar = ProgressBar::new(0);
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.enable_steady_tick(Duration::from_millis(500));
        Self {
            bar,
            cells,
            terminal: io::stderr().is_terminal(),
            counts: std::sync::Mutex::default(),
        }
    }
}

impl Progress for Watch {
    fn begins(&self, cell: &Cell, points: u64) {
        let mut counts = super::lock(&self.counts);
        counts.0 += 1;
        counts.1 += points;
        // What is not yet known is taken to be like what is.
        let all = counts.1 * self.cells as u64 / counts.0 as u64;
        self.bar.set_length(all);
        self.bar
            .set_message(format!("cell {} of {}: {cell}", counts.0, self.cells));
    }

    fn point(&self) {
        self.bar.inc(1);
    }

    fn done(&self, findings: &Findings) {
        if !self.terminal {
            eprintln!(
                "{}: {} of {} points, {} diverged, {:.0} s",
                findings.cell,
                findings.run,
                findings.points,
                findings.diverged.len(),
                findings.seconds
            );
        }
    }
}
