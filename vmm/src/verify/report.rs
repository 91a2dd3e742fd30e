//! What was found, for people and for programs.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;

use super::{Findings, State};

/// A state that only one of the execution models shows.
#[derive(Clone, Debug, Serialize)]
pub struct Difference {
    /// Scene.
    pub scene: String,
    /// Preemption level.
    pub preempt: String,
    /// The configuration that does not show it.
    pub lacks: String,
    /// The state.
    pub state: State,
}

/// What was found in all cells.
#[derive(Clone, Debug, Serialize)]
pub struct Verification {
    /// Cells, in the order in which they were given.
    pub cells: Vec<Findings>,
    /// States that only one of the execution models shows.
    pub differences: Vec<Difference>,
    /// Every so many points were looked at.
    pub stride: u64,
    /// At most so many in each cell.
    pub budget: Option<u64>,
    /// Of the choice.
    pub seed: u64,
    /// Configuration of the second machine, in which the target was put together, if there was one.
    pub into: Option<String>,
    /// Time, seconds.
    pub seconds: f64,
}

/// Kernel instructions in a bar of the histogram.
const BAR: u64 = 250;

impl Verification {
    /// Whether nothing went wrong.
    pub fn holds(&self) -> bool {
        self.differences.is_empty() && self.cells.iter().all(|cell| cell.diverged.is_empty())
    }

    /// For people.
    pub fn text(&self) -> String {
        let mut text = format!(
            "{:44} {:15} {:>7} {:>7} {:>7} {:>6} {:>8} {:>6} {:>9}\n",
            "SCENE",
            "CONFIGURATION",
            "POINTS",
            "RUN",
            "SAME",
            "MISSED",
            "DIVERGED",
            "STATES",
            "MAX DELAY"
        );
        for cell in &self.cells {
            let delay = cell.delays.keys().next_back();
            let _ = writeln!(
                text,
                "{:44} {:15} {:>7} {:>7} {:>7} {:>6} {:>8} {:>6} {:>9}",
                cell.cell.scene,
                format!("{}/{}", cell.cell.configuration, cell.cell.vcpus),
                cell.points,
                cell.run,
                cell.same,
                cell.missed,
                cell.diverged.len(),
                cell.states.len(),
                delay.map_or("-".into(), u64::to_string),
            );
        }
        text.push_str(&self.delays());
        let into = self.into.as_ref();
        let option = into.map_or_else(String::new, |into| format!(" --into {into}"));
        for cell in &self.cells {
            for divergence in &cell.diverged {
                if divergence.point == 0 {
                    let _ = writeln!(text, "\n{}: {}", cell.cell, divergence.what);
                    continue;
                }
                let _ = writeln!(
                    text,
                    "\n{}, point {} and {} like it, at {}: {}\n  replay: flukevm verify {} --model {} --preempt {} --vcpus {}{option} --replay {}:{}",
                    cell.cell,
                    divergence.point,
                    divergence.same,
                    divergence.place,
                    divergence.what,
                    cell.cell.scene,
                    cell.cell.configuration.model(),
                    cell.cell.configuration.preempt(),
                    cell.cell.vcpus,
                    self.seed,
                    divergence.point,
                );
            }
        }
        for difference in &self.differences {
            let _ = writeln!(
                text,
                "\n{}: {} does not show a state that the other model shows: {:x?}",
                difference.scene, difference.lacks, difference.state
            );
        }
        let sum = |count: fn(&Findings) -> u64| self.cells.iter().map(count).sum::<u64>();
        let run = sum(|cell| cell.run);
        let _ = writeln!(
            text,
            "\n{} cells{}, {} points, {run} run, {} of these the same as others, {} missed, {} diverged, {} states of one model alone; {:.0} s, {:.0} points/s",
            self.cells.len(),
            into.map_or_else(String::new, |into| format!(" into {into}")),
            sum(|cell| cell.points),
            sum(|cell| cell.same),
            sum(|cell| cell.missed),
            sum(|cell| cell.diverged.len() as u64),
            self.differences.len(),
            self.seconds,
            run as f64 / self.seconds.max(0.001),
        );
        text
    }

    /// Histograms of the delays, by configuration.
    fn delays(&self) -> String {
        let mut bars: BTreeMap<String, BTreeMap<u64, u64>> = BTreeMap::new();
        for cell in &self.cells {
            let bars = bars.entry(cell.cell.configuration.to_string()).or_default();
            for (delay, count) in &cell.delays {
                *bars.entry(delay / BAR * BAR).or_default() += count;
            }
        }
        let mut text = String::new();
        for (configuration, bars) in bars.iter().filter(|(_, bars)| !bars.is_empty()) {
            let all: u64 = bars.values().sum();
            let _ = writeln!(
                text,
                "\n{configuration}: kernel instructions from the doorbell to the state, {all} points"
            );
            for (from, count) in bars {
                let width = (count * 50).div_ceil(all) as usize;
                let _ = writeln!(text, "  {from:>6} {count:>7} {}", "#".repeat(width));
            }
        }
        text
    }

    /// As JUnit has it: a test for each cell.
    pub fn junit(&self) -> String {
        let escape = |text: &str| {
            text.replace('&', "&amp;")
                .replace('<', "&lt;")
                .replace('"', "&quot;")
        };
        let failures = self.cells.iter().filter(|cell| !cell.diverged.is_empty());
        let mut xml = format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuite name=\"flukevm verify\" tests=\"{}\" failures=\"{}\" time=\"{:.3}\">\n",
            self.cells.len() + usize::from(!self.differences.is_empty()),
            failures.count() + usize::from(!self.differences.is_empty()),
            self.seconds
        );
        for cell in &self.cells {
            let _ = write!(
                xml,
                "  <testcase classname=\"{}/{}\" name=\"{}\" time=\"{:.3}\"",
                cell.cell.configuration,
                cell.cell.vcpus,
                escape(&cell.cell.scene),
                cell.seconds
            );
            match cell.diverged.first() {
                None => xml.push_str("/>\n"),
                Some(first) => {
                    let _ = writeln!(
                        xml,
                        ">\n    <failure message=\"{} of {} points diverged\">point {} at {}: {}</failure>\n  </testcase>",
                        cell.diverged.len(),
                        cell.run,
                        first.point,
                        escape(&first.place),
                        escape(&first.what)
                    );
                }
            }
        }
        if let Some(first) = self.differences.first() {
            let _ = writeln!(
                xml,
                "  <testcase classname=\"models\" name=\"states\">\n    <failure message=\"{} states are of one model alone\">{} lacks, in {}: {}</failure>\n  </testcase>",
                self.differences.len(),
                escape(&first.lacks),
                escape(&first.scene),
                escape(&format!("{:x?}", first.state))
            );
        }
        xml.push_str("</testsuite>\n");
        xml
    }
}
