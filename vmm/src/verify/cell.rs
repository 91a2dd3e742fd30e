//! A cell: a scene in one configuration, and what is found there.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::state::State;
use crate::config::{Configuration, VmConfig};
use crate::error::Error;

/// The program that plays the scenes.
pub const PROGRAM: &str = "audit";

/// Memory of the machine, bytes.
const MEMORY: u64 = 24 << 20;

/// How many times slower than the host's the clock of a machine is that is stepped through. A time slice of 10 ms
/// would end in some runs of a scene, and not in others.
pub const SLOWNESS: u32 = 1000;

/// Which points of a cell to look at.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Every so many, at least 1.
    pub stride: u64,
    /// Of these at most so many, chosen at random.
    pub budget: Option<u64>,
    /// Of the choice.
    pub seed: u64,
    /// Count how long the state takes at every so many of the points looked at; 0 is never.
    pub delay_stride: u64,
    /// Play on from every point, even if the machine is in a state from which it was played on before.
    pub play_all: bool,
    /// Put the target together in a second machine of that configuration, not in the one where it was taken apart.
    /// Needs one vCPU.
    pub into: Option<Configuration>,
}

/// A cell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Cell {
    /// Name of the scene.
    pub scene: String,
    /// Kernel.
    #[serde(serialize_with = "display")]
    pub configuration: Configuration,
    /// Number of vCPUs.
    pub vcpus: u32,
}

fn display<S: serde::Serializer>(value: &Configuration, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(value)
}

/// A point after which the machine did not do what it does undisturbed.
#[derive(Clone, Debug, Serialize)]
pub struct Divergence {
    /// Number of the point, from 1. 0 is the scene undisturbed, which could not be played.
    pub point: u64,
    /// Where the kernel was.
    pub place: String,
    /// What happened instead.
    pub what: String,
    /// Later points that were the same.
    pub same: u64,
}

/// What was found in a cell.
#[derive(Clone, Debug, Serialize)]
pub struct Findings {
    /// The cell.
    #[serde(flatten)]
    pub cell: Cell,
    /// Points that there are.
    pub points: u64,
    /// Points looked at.
    pub run: u64,
    /// Of these, points that are as good as another: interrupts were off until then, or the doorbell's found all
    /// registers and all memory, but for times, as after another point. What comes of it is known.
    pub same: u64,
    /// Points that were not come to again: something else, the clock most often, happened before.
    pub missed: u64,
    /// What went wrong.
    pub diverged: Vec<Divergence>,
    /// States that were extracted.
    pub states: BTreeSet<State>,
    /// How many kernel instructions from the doorbell until the auditor had the state, and how often.
    pub delays: BTreeMap<u64, u64>,
    /// Time, seconds.
    pub seconds: f64,
}

impl Findings {
    /// Nothing found yet, at none of so many points.
    pub(super) fn none(cell: Cell, points: u64) -> Self {
        Self {
            cell,
            points,
            run: 0,
            same: 0,
            missed: 0,
            diverged: Vec::new(),
            states: BTreeSet::new(),
            delays: BTreeMap::new(),
            seconds: 0.0,
        }
    }

    /// The scene cannot be played.
    pub(super) fn unplayed(cell: Cell, why: &str) -> Self {
        let mut findings = Self::none(cell, 0);
        findings.diverged.push(Divergence {
            point: 0,
            place: String::new(),
            what: format!("the scene {why}"),
            same: 0,
        });
        findings
    }
}

impl Plan {
    /// How many of so many points to look at.
    pub fn count(&self, points: u64) -> u64 {
        self.points(points).len() as u64
    }

    /// Numbers of the points to look at, of so many, in order.
    pub(super) fn points(&self, points: u64) -> Vec<u64> {
        let mut random = fastrand::Rng::with_seed(self.seed);
        let first = 1 + random.u64(0..self.stride.max(1));
        let mut chosen: Vec<_> = (first..=points)
            .step_by(self.stride.max(1) as usize)
            .collect();
        if let Some(budget) = self.budget {
            random.shuffle(&mut chosen);
            chosen.truncate(budget as usize);
            chosen.sort_unstable();
        }
        chosen
    }
}

/// Scenes that tell who comes first by priorities, or on which CPU somebody is; on several vCPUs neither holds.
const IN_ORDER: [&str; 9] = [
    "cpu_self",
    "ipc_client_alert",
    "ipc_server_alert",
    "thread_get_state",
    "thread_interrupt",
    "thread_sleep",
    "thread_sleep-state",
    "thread_schedule",
    "mutex_lock-interrupt",
];

impl Cell {
    /// Whether the scene can be played on several vCPUs.
    pub fn is_for_several(&self) -> bool {
        !IN_ORDER.contains(&self.scene.as_str())
    }

    /// The machine that plays its scene.
    ///
    /// # Errors
    /// If there is no such kernel or program.
    pub fn machine(&self) -> Result<VmConfig, Error> {
        let scene = std::slice::from_ref(&self.scene);
        let config = VmConfig::fluke(self.configuration, PROGRAM, scene)?;
        Ok(config.memory(MEMORY).vcpus(self.vcpus).slower(SLOWNESS))
    }
}

impl std::fmt::Display for Cell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} in {}/{}", self.scene, self.configuration, self.vcpus)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(stride: u64, budget: Option<u64>) -> Plan {
        Plan {
            stride,
            budget,
            seed: 7,
            delay_stride: 0,
            play_all: false,
            into: None,
        }
    }

    #[test]
    fn all_points_are_looked_at_or_a_choice() {
        assert_eq!(plan(1, None).points(5), [1, 2, 3, 4, 5]);
        let some = plan(3, None).points(100);
        assert!(
            some.windows(2).all(|pair| pair[1] - pair[0] == 3),
            "{some:?}"
        );
        assert!(some[0] <= 3 && some.last().unwrap() > &97);
        let few = plan(1, Some(4)).points(1000);
        assert!(few.len() == 4 && few.is_sorted(), "{few:?}");
        assert_eq!(few, plan(1, Some(4)).points(1000));
        assert!(plan(1, Some(4)).points(0).is_empty());
    }
}
