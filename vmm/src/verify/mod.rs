//! Proof, by doing it, that every system call can be taken apart at any instruction.
//!
//! The guest program `audit` plays a scene: a thread makes a call. At each of the *points* of a cell, which
//! are the kernel's instructions in that call, the host rings a doorbell. The program's auditor then extracts
//! the thread's state by ordinary calls, destroys the thread, makes it again from the state and lets it go on.
//! What comes of the scene must be what comes of it undisturbed; the state must be a legal entry into the
//! kernel; and the two execution models must show the same states (OSDI '99, section 4.1).
//!
//! * `cell`: a scene in a configuration; `explorer` takes it apart, `same` sees when that need not be played to its
//!   end, `state` what is to be equal.
//! * `elsewhere`: a second machine, in which what was taken apart is put together.
//! * `interleave`: several vCPUs in turn.
//! * `command`: the command.
//! * `mutants`: whether kernels with bugs are found out.
//! * `report`: what was found, for people and programs.

mod cell;
pub mod command;
mod elsewhere;
mod explorer;
mod interleave;
pub mod mutants;
mod report;
mod same;
mod state;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use crate::config::{Configuration, Model, Preempt, VmConfig};
use crate::error::Error;
use crate::vm::Vm;

pub use cell::{Cell, Divergence, Findings, PROGRAM, Plan};
pub use explorer::Explorer;
use explorer::Unplayable;
pub use report::{Difference, Verification};
pub use state::State;

/// Names of all scenes, as the program lists them.
///
/// # Errors
/// If the host cannot run it.
pub fn scenes() -> Result<Vec<String>, Error> {
    let configuration = Configuration::new(Model::Interrupt, Preempt::None)?;
    let outcome = Vm::new(VmConfig::fluke(configuration, PROGRAM, &[])?)?.run()?;
    Ok(outcome.console_text().lines().map(String::from).collect())
}

/// What to do with the cells, and how.
pub struct Job<'a> {
    /// The cells.
    pub cells: Vec<Cell>,
    /// Which of their points.
    pub plan: Plan,
    /// Cells that are looked at at once.
    pub jobs: usize,
    /// Is told of each cell that begins, with its points looked at, and of each point.
    pub progress: &'a dyn Progress,
}

/// Whoever watches.
pub trait Progress: Sync {
    /// A cell begins; so many points are to be looked at.
    fn begins(&self, cell: &Cell, points: u64);
    /// A point was looked at.
    fn point(&self);
    /// A cell is done.
    fn done(&self, findings: &Findings);
}

/// Explores all cells.
///
/// # Errors
/// If a scene cannot be played, or the host fails.
pub fn verify(job: &Job<'_>) -> Result<Verification, Error> {
    let started = Instant::now();
    let cells = each(&job.cells, job.jobs, |cell, stop| explore(job, cell, stop))?;
    let complete = job.plan.stride == 1 && job.plan.budget.is_none();
    Ok(Verification {
        differences: if complete {
            differences(&cells)
        } else {
            Vec::new()
        },
        cells,
        stride: job.plan.stride,
        budget: job.plan.budget,
        seed: job.plan.seed,
        into: job.plan.into.map(|into| into.to_string()),
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// Does the work of every item, so many at once; what came of them, in order. `work` is told when to stop, since
/// another one has failed.
///
/// # Errors
/// The first error of the work.
fn each<T: Sync, R: Send>(
    items: &[T],
    jobs: usize,
    work: impl Fn(&T, &AtomicBool) -> Result<R, Error> + Sync,
) -> Result<Vec<R>, Error> {
    let left = Mutex::new(items.iter().enumerate());
    let done = Mutex::new(BTreeMap::new());
    let failed = Mutex::new(None);
    let stop = AtomicBool::new(false);
    let next = || lock(&left).next().filter(|_| !stop.load(Ordering::Relaxed));
    let worker = || {
        while let Some((number, item)) = next() {
            match work(item, &stop) {
                Ok(result) => {
                    lock(&done).insert(number, result);
                }
                Err(error) => {
                    lock(&failed).get_or_insert(error);
                    stop.store(true, Ordering::Relaxed);
                }
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..jobs {
            scope.spawn(worker);
        }
        worker();
    });
    match lock(&failed).take() {
        Some(error) => Err(error),
        None => Ok(std::mem::take(&mut *lock(&done)).into_values().collect()),
    }
}

fn explore(job: &Job<'_>, cell: &Cell, stop: &AtomicBool) -> Result<Findings, Error> {
    let explorer = match Explorer::new(cell.clone(), job.plan.into) {
        Ok(explorer) => explorer,
        Err(Unplayable::Host(error)) => return Err(error),
        Err(Unplayable::Scene(why)) => {
            let findings = Findings::unplayed(cell.clone(), &why);
            job.progress.begins(cell, 0);
            job.progress.done(&findings);
            return Ok(findings);
        }
    };
    job.progress.begins(cell, job.plan.count(explorer.points));
    let findings = explorer.explore(&job.plan, &|_| {
        job.progress.point();
        !stop.load(Ordering::Relaxed)
    })?;
    job.progress.done(&findings);
    Ok(findings)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// States in the call that one execution model shows and the other does not, at the same preemption level. Where
/// all points were looked at, there must be none. How far beyond the call the target comes before it is stopped is
/// the host's affair, which may be late with an interrupt.
fn differences(cells: &[Findings]) -> Vec<Difference> {
    let mut models: BTreeMap<(&str, String), Vec<&Findings>> = BTreeMap::new();
    for findings in cells {
        let Cell {
            scene,
            configuration,
            vcpus,
        } = &findings.cell;
        if *vcpus == 1 && findings.points > 0 {
            let level = configuration.preempt().to_string();
            models.entry((scene, level)).or_default().push(findings);
        }
    }
    let mut differences = Vec::new();
    for ((scene, preempt), cells) in models {
        let all: BTreeSet<_> = cells
            .iter()
            .flat_map(|cell| &cell.states)
            // How far a program comes after its call, before the doorbell is heard, is the host's affair.
            .filter(|state| state.is_in_call() && state.entry.is_some())
            .collect();
        for findings in &cells {
            for &state in all.iter().filter(|state| !findings.states.contains(*state)) {
                differences.push(Difference {
                    scene: scene.into(),
                    preempt: preempt.clone(),
                    lacks: findings.cell.configuration.to_string(),
                    state: state.clone(),
                });
            }
        }
    }
    differences
}

#[cfg(test)]
mod tests {
    use super::*;
    use fluke_abi::audit::MARK;

    #[test]
    fn a_scene_that_cannot_be_played_is_one_finding_among_others() {
        let cell = |model| Cell {
            scene: "mutex_lock".into(),
            configuration: Configuration::new(model, Preempt::None).unwrap(),
            vcpus: 1,
        };
        let mut played = Findings::none(cell(Model::Process), 7);
        let mut registers = [0; 16];
        registers[13] = MARK;
        played.states.insert(State {
            entry: Some("mutex_lock"),
            registers,
        });
        let other = Findings::none(cell(Model::Interrupt), 7);
        assert_eq!(differences(&[played.clone(), other]).len(), 1);
        let unplayed = Findings::unplayed(cell(Model::Interrupt), "hangs");
        assert!(differences(&[played, unplayed.clone()]).is_empty());
        assert_eq!(unplayed.diverged.len(), 1);
    }
}
