//! Running a workload: a machine for each sample, configurations in turn.

use std::collections::BTreeMap;
use std::time::Duration;

use super::Column;
use crate::config::{MIB, VmConfig};
use crate::error::Error;
use crate::stats::KernelCounts;
use crate::stop::StopReason;
use crate::vm::{Outcome, Vm};

/// A run that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(600);

/// A program to run.
#[derive(Clone, Debug)]
pub struct Workload {
    /// Its name.
    pub program: &'static str,
    /// Arguments.
    pub args: Vec<String>,
    /// Files: name and contents.
    pub files: Vec<(&'static str, &'static [u8])>,
    /// Memory of the machine, bytes.
    pub memory: u64,
    /// vCPUs.
    pub vcpus: u32,
}

impl Workload {
    /// A program with arguments, on one vCPU.
    pub fn new(program: &'static str, args: &[String]) -> Self {
        Self {
            program,
            args: args.to_vec(),
            files: Vec::new(),
            memory: 128 * MIB,
            vcpus: 1,
        }
    }

    /// The machine that runs it.
    ///
    /// # Errors
    /// If this build has no such kernel or program.
    pub fn machine(&self, column: &Column) -> Result<VmConfig, Error> {
        let mut config = VmConfig::fluke(column.configuration, self.program, &self.args)?
            .vcpus(self.vcpus)
            .memory(self.memory)
            .timeout(PATIENCE);
        for (name, data) in &self.files {
            config = config.file(name, data.to_vec());
        }
        match (column.mutant, column.variant) {
            (Some(mutant), _) => config.mutate(mutant),
            (None, Some(variant)) => config.variant(variant),
            (None, None) => Ok(config),
        }
    }

    /// What the machine is called in messages.
    pub fn on(&self, column: &Column) -> String {
        format!("{} in {}", self.program, column.name)
    }
}

/// What a workload said and did.
#[derive(Clone, Debug, Default)]
pub struct Run {
    /// Cycles of one operation, by piece of work, each time that it was measured.
    pub samples: BTreeMap<String, Vec<f64>>,
    /// Pieces of work in order.
    pub order: Vec<String>,
    /// Cycles of all.
    pub total: f64,
    /// Other figures.
    pub figures: BTreeMap<String, u64>,
    /// Of `flukeperf`'s watch, by name.
    pub latency: BTreeMap<String, u64>,
    /// How often it was so late: least lateness of a bin, nanoseconds, and count.
    pub late: Vec<(u64, u64)>,
    /// From the first user-mode instruction to the end.
    pub wall: Duration,
    /// What the kernel counted, on all vCPUs.
    pub kernel: KernelCounts,
}

/// Runs a workload once.
///
/// # Errors
/// If the machine cannot be built, or the program does not end well.
pub fn once(workload: &Workload, column: &Column) -> Result<Run, Error> {
    let outcome = Vm::new(workload.machine(column)?)?.run()?;
    let fails = |why: String| Error::Control(format!("{}: {why}", workload.on(column)));
    if !matches!(outcome.stop, StopReason::Exited(0)) {
        let said = outcome.console_text();
        let last = said.lines().last().unwrap_or("nothing");
        return Err(fails(format!("{}; it printed: {last}", outcome.stop)));
    }
    read(&outcome).map_err(fails)
}

fn read(outcome: &Outcome) -> Result<Run, String> {
    let first = outcome.time_to_first_user.unwrap_or_default();
    let mut run = Run {
        wall: outcome.elapsed.saturating_sub(first),
        ..Run::default()
    };
    for stats in &outcome.stats {
        let (sum, one) = (&mut run.kernel, &stats.kernel);
        sum.calls += one.calls;
        sum.restarts += one.restarts;
        sum.context_switches += one.context_switches;
        sum.soft_faults += one.soft_faults;
        sum.hard_faults += one.hard_faults;
        sum.exceptions += one.exceptions;
        sum.ipis_sent += one.ipis_sent;
        sum.timer_interrupts += one.timer_interrupts;
        sum.preemptions += one.preemptions;
    }
    for line in outcome.console_text().lines() {
        parse(line, &mut run).ok_or_else(|| format!("it printed `{line}`"))?;
    }
    Ok(run)
}

/// Takes in a line that the program printed; none if it is no such line.
fn parse(line: &str, run: &mut Run) -> Option<()> {
    let mut words = line.split(' ');
    let (kind, name) = (words.next()?, words.next()?);
    let number = |word: &str| word.parse::<u64>().ok();
    match kind {
        "sample" => {
            let operations = number(words.next()?)? as f64;
            let cycles: Option<Vec<f64>> = words
                .map(|word| Some(number(word)? as f64 / operations))
                .collect();
            run.order.push(name.into());
            run.samples.insert(name.into(), cycles?);
        }
        "total" => run.total = number(name)? as f64,
        "figure" => drop(run.figures.insert(name.into(), number(words.next()?)?)),
        "latency" => drop(run.latency.insert(name.into(), number(words.next()?)?)),
        "late" => run.late.push((number(name)?, number(words.next()?)?)),
        _ => return None,
    }
    Some(())
}

/// Does something so many times for each column, in turn, in an order that is drawn anew for each round. What came of
/// it, by column.
///
/// # Errors
/// The first that occurs.
pub fn interleaved<T>(
    columns: &[Column],
    rounds: u64,
    seed: u64,
    mut what: impl FnMut(&Column, u64) -> Result<T, Error>,
) -> Result<Vec<(Column, Vec<T>)>, Error> {
    let mut found: Vec<(Column, Vec<T>)> = columns
        .iter()
        .map(|column| (column.clone(), Vec::new()))
        .collect();
    let mut random = fastrand::Rng::with_seed(seed);
    let mut order: Vec<usize> = (0..columns.len()).collect();
    for round in 0..rounds {
        random.shuffle(&mut order);
        for &place in &order {
            let (column, results) = &mut found[place];
            results.push(what(column, round)?);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Configuration;

    #[test]
    fn lines_are_understood_and_others_are_not() {
        let mut run = Run::default();
        for line in [
            "sample null 4 40 44",
            "total 84",
            "figure faults 3",
            "latency runs 7",
            "late 1024 6",
        ] {
            assert_eq!(parse(line, &mut run), Some(()), "{line}");
        }
        assert_eq!(run.samples["null"], [10.0, 11.0]);
        assert_eq!((run.total, run.figures["faults"]), (84.0, 3));
        assert_eq!((run.latency["runs"], &run.late[..]), (7, &[(1024, 6)][..]));
        for line in ["", "hello", "sample null", "sample null 4 x", "total x"] {
            assert_eq!(parse(line, &mut run), None, "{line}");
        }
    }

    #[test]
    fn columns_take_turns() {
        let columns: Vec<_> = Configuration::ALL.into_iter().map(Column::of).collect();
        let mut seen = Vec::new();
        let found = interleaved(&columns, 6, 3, |column, round| {
            seen.push((round, column.name.clone()));
            Ok(round)
        })
        .unwrap();
        assert!(
            found
                .iter()
                .all(|(_, rounds)| *rounds == [0, 1, 2, 3, 4, 5])
        );
        let orders: std::collections::BTreeSet<Vec<_>> = seen
            .chunks(columns.len())
            .map(|round| round.iter().map(|(_, name)| name.clone()).collect())
            .collect();
        assert!(orders.len() > 1, "not always the same order");
    }
}
