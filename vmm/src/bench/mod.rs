//! `flukevm bench`: the paper's tables, measured on the kernel that we have, and some that it lacks.
//!
//! Workloads are guest programs (`benches/guest`) that measure with the time-stamp counter, or tell the host where
//! pieces of work begin and end, between which it steps through the kernel and counts ([`trace`]). Configurations
//! take turns ([`run`]); one of them is measured under two names, so that the noise is known.
//!
//! * [`model`]: what was measured, as it is kept.
//! * [`tables`]: a module for each table; each is a [`Tabulate`].
//! * [`sample`]: statistics. [`code`], [`stretch`]: what the kernel's instructions are; where nobody else can run.
//! * [`paper`]: the paper's figures.
//! * [`text`], [`csv`], [`html`] with its [`plot`]s: for people, spreadsheets, browsers. [`compare`]: what has changed.
//! * [`command`]: the command.

pub mod code;
pub mod command;
pub mod compare;
pub mod csv;
pub mod html;
pub mod model;
pub mod paper;
pub mod plot;
pub mod run;
pub mod sample;
pub mod stretch;
pub mod tables;
pub mod text;
pub mod trace;

use std::collections::BTreeMap;
use std::sync::{Mutex, OnceLock};
use std::thread;
use std::time::Instant;

use fluke_abi::mutant::Mutant;

use crate::config::{Configuration, Model, Preempt};
use crate::doctor;
use crate::error::Error;
use crate::image;

use model::{Build, Cell, Host, Measure, Noise, Report, SCHEMA, Settings, Table};
use run::Run;
use tables::applications::{self, Found, NAMES};

/// A column of most tables: a configuration, under a name.
#[derive(Clone, Debug, PartialEq)]
pub struct Column {
    /// Its name.
    pub name: String,
    /// The configuration.
    pub configuration: Configuration,
    /// Another kernel than its own, by name.
    pub variant: Option<&'static str>,
    /// A bug that the kernel is to have, for tests.
    pub mutant: Option<Mutant>,
}

impl Column {
    /// A configuration under its own name.
    pub fn of(configuration: Configuration) -> Self {
        Self {
            name: configuration.to_string(),
            configuration,
            variant: None,
            mutant: None,
        }
    }

    /// The same under another name.
    fn again(&self) -> Self {
        Self {
            name: format!("{}{AGAIN}", self.name),
            ..self.clone()
        }
    }

    /// Whether it is the one that is only there to be compared with another.
    pub fn is_again(&self) -> bool {
        self.name.ends_with(AGAIN)
    }
}

/// What the name of a column of the same configuration as another ends with.
const AGAIN: &str = " again";

/// What to measure, and how.
#[derive(Clone, Debug)]
pub struct Job {
    /// Names of tables; all, if empty.
    pub tables: Vec<String>,
    /// The configurations.
    pub configurations: Vec<Configuration>,
    /// The settings.
    pub settings: Settings,
    /// A bug that all kernels are to have, for tests.
    pub mutant: Option<Mutant>,
}

/// A table.
pub trait Tabulate: Sync {
    /// Its name on the command line: in most cases the paper's number.
    fn id(&self) -> &'static str;

    /// What it shows.
    fn title(&self) -> &'static str;

    /// Fills in what can be measured on this host.
    ///
    /// # Errors
    /// If a machine cannot be built, or a workload fails.
    fn measure(&self, bench: &Bench<'_>, table: &mut Table) -> Result<(), Error>;
}

/// What tables have in common while they are measured.
pub struct Bench<'a> {
    /// What to measure.
    pub job: &'a Job,
    /// What the host is.
    pub host: &'static doctor::Report,
    /// Is told what is being done.
    pub progress: &'a (dyn Fn(&str) + Sync),
    applications: [OnceLock<Vec<Found>>; NAMES.len()],
}

impl<'a> Bench<'a> {
    fn new(job: &'a Job, progress: &'a (dyn Fn(&str) + Sync)) -> Result<Self, Error> {
        Ok(Self {
            job,
            host: doctor::probe()?,
            progress,
            applications: Default::default(),
        })
    }

    /// The settings.
    pub fn settings(&self) -> &Settings {
        &self.job.settings
    }

    /// Configurations to measure, the first of them twice.
    pub fn columns(&self) -> Vec<Column> {
        let mut columns = self.configurations();
        let again = columns.first().map(Column::again);
        columns.extend(again);
        columns
    }

    /// Configurations to measure.
    pub fn configurations(&self) -> Vec<Column> {
        let configurations = self.job.configurations.iter();
        configurations
            .map(|&configuration| Column {
                mutant: self.job.mutant,
                ..Column::of(configuration)
            })
            .collect()
    }

    /// Configurations to measure in a table that takes long: in a quick run, those without preemption.
    pub fn few(&self) -> Vec<Column> {
        let mut columns = self.configurations();
        if self.settings().quick && columns.len() > 2 {
            columns.retain(|column| column.configuration.preempt() == Preempt::None);
        }
        columns
    }

    /// The column that others are compared with: Process NP, if that is measured.
    pub fn baseline(&self) -> Option<String> {
        let first = Configuration::new(Model::Process, Preempt::None).ok()?;
        let measured = self.job.configurations.contains(&first);
        measured.then(|| first.to_string())
    }

    /// Why instructions cannot be counted here, if they cannot.
    pub fn uncountable(&self) -> Option<&'static str> {
        match self.host.cpl0 {
            doctor::Cpl0::Emulated if self.host.single_step && self.host.hardware_breakpoints => {
                None
            }
            doctor::Cpl0::Emulated => Some("this host cannot step through a kernel"),
            doctor::Cpl0::Hardware => Some(
                "not counted here: a kernel that is stepped through on hardware is disturbed by each step; \
                 counts are the same on every host, and are made on one that emulates",
            ),
        }
    }

    /// What came of an application, which several tables are made of.
    ///
    /// # Errors
    /// If it fails.
    pub fn application(&self, name: &'static str) -> Result<&[Found], Error> {
        let place = NAMES.iter().position(|other| *other == name);
        let Some(slot) = place.and_then(|place| self.applications.get(place)) else {
            return Ok(&[]);
        };
        if let Some(found) = slot.get() {
            return Ok(found);
        }
        let found = applications::measure(self, name)?;
        Ok(slot.get_or_init(|| found))
    }

    /// A value of samples.
    pub fn cell(&self, row: &str, column: &str, measure: Measure, samples: Vec<f64>) -> Cell {
        if self.settings().reps == 0 && samples.is_empty() {
            return Cell::missing(row, column, measure, "only counts were wanted");
        }
        Cell::new(row, column, measure, samples, self.settings().seed)
    }

    /// Does something for each column, several at once: for what does not depend on time.
    ///
    /// # Errors
    /// The first that occurs.
    pub fn at_once<T: Send>(
        &self,
        columns: &[Column],
        what: impl Fn(&Column) -> Result<T, Error> + Sync,
    ) -> Result<Vec<(Column, T)>, Error> {
        let left = Mutex::new(columns.iter().enumerate());
        let found = Mutex::new(BTreeMap::new());
        let work = || {
            loop {
                let next = left.lock().ok().and_then(|mut left| left.next());
                let Some((place, column)) = next else { return };
                let result = what(column);
                if let Ok(mut found) = found.lock() {
                    found.insert(place, (column.clone(), result));
                }
            }
        };
        let most = thread::available_parallelism().map_or(1, usize::from);
        thread::scope(|scope| {
            for _ in 1..most.min(columns.len()) {
                scope.spawn(work);
            }
            work();
        });
        let found = found.into_inner().unwrap_or_default();
        found
            .into_values()
            .map(|(column, result)| Ok((column, result?)))
            .collect()
    }
}

/// Measures.
///
/// # Errors
/// If there is no table of a name, a machine cannot be built, or a workload fails.
pub fn measure(job: &Job, progress: &(dyn Fn(&str) + Sync)) -> Result<Report, Error> {
    let started = Instant::now();
    let bench = Bench::new(job, progress)?;
    let mut tables = Vec::new();
    for tabulate in chosen(&job.tables)? {
        progress(&format!("table {}: {}", tabulate.id(), tabulate.title()));
        let mut table = Table {
            id: tabulate.id().into(),
            title: tabulate.title().into(),
            baseline: bench.baseline(),
            ..Table::default()
        };
        tabulate.measure(&bench, &mut table)?;
        paper::fill(&mut table);
        table.noise = noise(&mut table);
        tables.push(table);
    }
    Ok(Report {
        schema: SCHEMA,
        host: host(&bench)?,
        build: build(job)?,
        settings: job.settings.clone(),
        tables,
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// The tables of those names, in the order that they have here.
fn chosen(names: &[String]) -> Result<Vec<&'static dyn Tabulate>, Error> {
    let known = || tables::ALL.iter().map(|table| table.id());
    if let Some(name) = names.iter().find(|name| !known().any(|id| id == **name)) {
        let known: Vec<_> = known().collect();
        return Err(Error::Config(format!(
            "there is no table `{name}`; there are {}",
            known.join(", ")
        )));
    }
    let wanted =
        |table: &&&dyn Tabulate| names.is_empty() || names.iter().any(|name| name == table.id());
    Ok(tables::ALL.iter().filter(wanted).copied().collect())
}

/// How far the two columns of one configuration are apart; the second is taken out.
fn noise(table: &mut Table) -> Vec<Noise> {
    let (again, cells): (Vec<_>, Vec<_>) = std::mem::take(&mut table.cells)
        .into_iter()
        .partition(|cell| cell.column.ends_with(AGAIN));
    table.cells = cells;
    let part = |cell: &Cell| {
        let first = table.cell(&cell.row, cell.column.strip_suffix(AGAIN)?, cell.measure)?;
        let (first, second) = (first.summary?.median, cell.summary?.median);
        (first != 0.0).then(|| Noise {
            row: cell.row.clone(),
            measure: cell.measure,
            part: ((second - first) / first).abs(),
        })
    };
    again.iter().filter_map(part).collect()
}

fn host(bench: &Bench<'_>) -> Result<Host, Error> {
    let column = bench.configurations().into_iter().next();
    let column = column.ok_or_else(|| Error::Config("no configuration is left".into()))?;
    let hello = run::Workload::new("hello", &[]);
    let tsc_khz = crate::vm::Vm::new(hello.machine(&column)?)?.tsc_khz();
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let processor = cpuinfo.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == "model name").then(|| value.trim().to_string())
    });
    Ok(Host {
        kernel_code: match bench.host.cpl0 {
            doctor::Cpl0::Emulated => "emulated",
            doctor::Cpl0::Hardware => "hardware",
        }
        .into(),
        processor: processor.unwrap_or_else(|| "unknown".into()),
        cpus: thread::available_parallelism().map_or(1, usize::from),
        gate: format!("{:?}", bench.host.gate).to_lowercase(),
        tsc_khz,
    })
}

fn build(job: &Job) -> Result<Build, Error> {
    let mut kernels = BTreeMap::new();
    for &configuration in &job.configurations {
        let image = match job.mutant {
            Some(_) => image::mutants(configuration.image())?,
            None => image::kernel(configuration.image())?,
        };
        let id = image::build_id(image).unwrap_or_default();
        kernels.insert(configuration.to_string(), id);
    }
    Ok(Build {
        version: env!("CARGO_PKG_VERSION").into(),
        profile: if cfg!(debug_assertions) {
            "debug"
        } else {
            "release"
        }
        .into(),
        kernels,
    })
}

/// The samples of a piece of work in all runs.
fn samples_of(runs: &[Run], name: &str) -> Vec<f64> {
    let of = |run: &Run| run.samples.get(name).cloned().unwrap_or_default();
    runs.iter().flat_map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_column_of_a_configuration_becomes_the_noise() {
        let cell = |column: &str, value| Cell::new("null", column, Measure::Cycles, vec![value], 1);
        let mut table = Table {
            cells: vec![
                cell("process-np", 100.0),
                cell("interrupt-np", 90.0),
                cell("process-np again", 103.0),
            ],
            ..Table::default()
        };
        let noise = noise(&mut table);
        assert_eq!(table.cells.len(), 2);
        assert_eq!(noise.len(), 1);
        assert!((noise[0].part - 0.03).abs() < 1e-9, "{noise:?}");
        table.noise = noise;
        assert!((table.floor("null", Measure::Cycles) - 0.03).abs() < 1e-9);
        assert!((table.floor("other", Measure::Cycles) - 0.03).abs() < 1e-9);
        assert_eq!(table.floor("null", Measure::Bytes), 0.0);
    }

    #[test]
    fn names_of_tables_are_their_own() {
        let mut ids: Vec<_> = tables::ALL.iter().map(|table| table.id()).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), tables::ALL.len());
        assert!(chosen(&["5".into()]).is_ok_and(|tables| tables.len() == 1));
        assert!(chosen(&["99".into()]).is_err());
    }
}
