//! Whether bugs would be found: kernels with one each, which must be found out.

use std::fmt::Write as _;
use std::time::Instant;

use fluke_abi::mutant::Mutant;
use serde::Serialize;

use super::explorer::Unplayable;
use super::{Cell, Explorer, Plan, each};
use crate::config::{Configuration, Model, Preempt};
use crate::error::Error;

/// Kernels in which a bug can be.
#[derive(Clone, Copy)]
enum Kernels {
    /// All.
    All,
    /// Those in which a thread that waits keeps its stack.
    Process,
    /// Those in which it also does while others run in the middle of its call.
    Full,
}

impl Kernels {
    fn has(self, configuration: &Configuration) -> bool {
        match self {
            Self::All => true,
            Self::Process => configuration.model() == Model::Process,
            Self::Full => configuration.preempt() == Preempt::Full,
        }
    }
}

/// On how many vCPUs a bug can be seen: on one most often, where all comes again in the same way.
const fn vcpus(mutant: Mutant) -> u32 {
    match mutant {
        Mutant::stop_unheard | Mutant::stop_not_awaited => 2,
        _ => 1,
    }
}

/// In which kernels a bug can be, and the scenes that it concerns.
const fn habitat(mutant: Mutant) -> (Kernels, &'static [&'static str]) {
    use Kernels::{All, Full, Process};
    match mutant {
        Mutant::none | Mutant::slow_transfer => (All, &["mutex_lock", "thread_sleep-state"]),
        Mutant::pointer_not_advanced => (All, &["ipc_client_connect_send_over_receive-long"]),
        Mutant::advanced_before_copy => (
            All,
            &[
                "ipc_server_ack_send_over_receive-fault",
                "ipc_client_connect_send_over_receive-fault",
            ],
        ),
        Mutant::table_not_advanced | Mutant::reference_again => {
            (All, &["ipc_client_connect_send_over_receive-tables"])
        }
        Mutant::progress_after_preemption => (Full, &["ipc_server_ack_send_over_receive-long"]),
        Mutant::search_torn => (Full, &["region_search"]),
        Mutant::completed_early => (Full, &["thread_interrupt"]),
        Mutant::handover_on_stack => (Full, &["mutex_lock"]),
        Mutant::cond_wait_again => (Process, &["cond_wait"]),
        Mutant::cond_wait_torn => (Full, &["cond_wait"]),
        Mutant::connect_again => (All, &["ipc_client_connect_send"]),
        Mutant::over_on_stack => (Full, &["ipc_server_over_receive-full"]),
        Mutant::kernel_mutex_kept => (Full, &["mutex_lock"]),
        Mutant::sender_not_exported | Mutant::partner_not_imported | Mutant::connection_broken => {
            (All, &["ipc_server_send", "ipc_client_send"])
        }
        Mutant::handlers_not_exported | Mutant::exceptions_not_imported => (All, &["thread_sleep"]),
        Mutant::pset_not_exported => (All, &["ipc_wait_receive"]),
        Mutant::pending_not_exported | Mutant::priority_not_imported => {
            (All, &["thread_sleep-state"])
        }
        Mutant::attention_not_called => (All, &["mutex_lock-interrupt"]),
        Mutant::client_forgotten => (All, &["ipc_reply_wait_receive"]),
        Mutant::reply_unlooked | Mutant::words_kept => (All, &["ipc_call-served"]),
        Mutant::waiter_left => (All, &["ipc_call"]),
        Mutant::fpu_not_exported | Mutant::register_not_exported => (All, &["mutex_lock"]),
        Mutant::sleeper_left | Mutant::doorbell_lost => (All, &["thread_sleep"]),
        Mutant::translation_left => (All, &["mapping_destroy"]),
        Mutant::stop_unheard | Mutant::stop_not_awaited => (All, &["mutex_lock", "cond_wait"]),
    }
}

/// The bugs of those names; all, if there are none.
///
/// # Errors
/// If there is no bug of a name.
pub fn named(names: &[String]) -> Result<Vec<Mutant>, Error> {
    if names.is_empty() {
        return Ok(Mutant::ALL.into());
    }
    let find = |name: &String| {
        Mutant::from_name(name).ok_or_else(|| {
            let all: Vec<_> = Mutant::ALL.iter().map(|mutant| mutant.name()).collect();
            Error::Config(format!(
                "there is no mutant `{name}`; there are {}",
                all.join(", ")
            ))
        })
    };
    names.iter().map(find).collect()
}

/// Which bugs to look for, and how.
pub struct Hunt {
    /// The bugs.
    pub mutants: Vec<Mutant>,
    /// Scenes to look in; those that a bug concerns, if empty.
    pub scenes: Vec<String>,
    /// Kernels that may have it, if it can be in them.
    pub configurations: Vec<Configuration>,
    /// Points to look at.
    pub plan: Plan,
    /// Bugs that are looked for at once.
    pub jobs: usize,
}

/// How a bug was found out.
#[derive(Clone, Debug, Serialize)]
pub struct Kill {
    /// Where.
    #[serde(flatten)]
    pub cell: Cell,
    /// Number of the point that showed it; none if it shows undisturbed.
    pub point: Option<u64>,
    /// Where the kernel was.
    pub place: String,
    /// What went wrong.
    pub what: String,
}

/// What came of one bug.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// Its name.
    pub mutant: &'static str,
    /// What is wrong.
    pub doc: &'static str,
    /// How it was found out, if it was.
    pub killed: Option<Kill>,
    /// Cells looked at.
    pub cells: u64,
    /// Points looked at.
    pub points: u64,
    /// Time, seconds.
    pub seconds: f64,
}

/// What came of all.
#[derive(Clone, Debug, Serialize)]
pub struct Verdicts {
    /// Of each, in order.
    pub mutants: Vec<Verdict>,
    /// Of the choice of points.
    pub seed: u64,
    /// Time, seconds.
    pub seconds: f64,
}

/// Looks for each bug until it is found out, or there is nowhere left to look.
///
/// # Errors
/// If this build has no kernels with bugs, a scene cannot be played without any, or the host fails.
pub fn hunt(hunt: &Hunt) -> Result<Verdicts, Error> {
    let started = Instant::now();
    let mutants = each(&hunt.mutants, hunt.jobs, |&mutant, _| {
        look_for(hunt, mutant)
    })?;
    Ok(Verdicts {
        mutants,
        seed: hunt.plan.seed,
        seconds: started.elapsed().as_secs_f64(),
    })
}

fn look_for(hunt: &Hunt, mutant: Mutant) -> Result<Verdict, Error> {
    let started = Instant::now();
    let mut verdict = Verdict {
        mutant: mutant.name(),
        doc: mutant.doc(),
        killed: None,
        cells: 0,
        points: 0,
        seconds: 0.0,
    };
    let (kernels, concerned) = habitat(mutant);
    let mut scenes = hunt.scenes.clone();
    if scenes.is_empty() {
        scenes = concerned.iter().map(|&scene| scene.into()).collect();
    }
    let all = hunt.configurations.iter().copied();
    let mut configurations: Vec<_> = all.filter(|each| kernels.has(each)).collect();
    // One is enough, most often: not the same for all.
    let first = mutant as usize % configurations.len().max(1);
    configurations.rotate_left(first);
    let mut cells = configurations.iter().flat_map(|&configuration| {
        scenes.iter().map(move |scene| Cell {
            scene: scene.clone(),
            configuration,
            vcpus: vcpus(mutant),
        })
    });
    while verdict.killed.is_none()
        && let Some(cell) = cells.next()
    {
        verdict.cells += 1;
        verdict.killed = look_in(&cell, mutant, &hunt.plan, &mut verdict.points)?;
    }
    verdict.seconds = started.elapsed().as_secs_f64();
    Ok(verdict)
}

/// Looks in one cell.
fn look_in(
    cell: &Cell,
    mutant: Mutant,
    plan: &Plan,
    points: &mut u64,
) -> Result<Option<Kill>, Error> {
    let kill = |point, place, what| {
        Some(Kill {
            cell: cell.clone(),
            point,
            place,
            what,
        })
    };
    let sane = Explorer::new(cell.clone(), None).map_err(|unplayable| unplayable.of(cell))?;
    let machine = cell.machine()?.mutate(mutant)?;
    let findings = match Explorer::with(cell.clone(), machine, Some(&sane)) {
        Ok(explorer) => explorer.explore(plan, &|findings| findings.diverged.is_empty())?,
        Err(Unplayable::Host(error)) => return Err(error),
        Err(Unplayable::Scene(why)) => return Ok(kill(None, String::new(), why)),
    };
    *points += findings.run;
    let first = findings.diverged.into_iter().next();
    Ok(first.and_then(|first| kill(Some(first.point), first.place, first.what)))
}

impl Verdicts {
    /// Whether all were found out.
    pub fn holds(&self) -> bool {
        self.mutants.iter().all(|verdict| verdict.killed.is_some())
    }

    /// For people.
    pub fn text(&self) -> String {
        let mut text = format!(
            "{:26} {:8} {:13} {:44} {:>6} {}\n",
            "MUTANT", "VERDICT", "CONFIGURATION", "SCENE", "POINT", "WHERE, WHAT"
        );
        for verdict in &self.mutants {
            let Some(kill) = &verdict.killed else {
                let _ = writeln!(
                    text,
                    "{:26} survived {} cells, {} points",
                    verdict.mutant, verdict.cells, verdict.points
                );
                continue;
            };
            let point = kill.point.map_or("-".into(), |point| point.to_string());
            let place = match kill.point {
                Some(_) => &kill.place,
                None => "undisturbed",
            };
            let _ = writeln!(
                text,
                "{:26} killed   {:13} {:44} {point:>6} {place}: {}",
                verdict.mutant,
                kill.cell.configuration.to_string(),
                kill.cell.scene,
                kill.what.lines().next().unwrap_or_default()
            );
        }
        let kills = self.mutants.iter().filter_map(|each| each.killed.as_ref());
        let _ = writeln!(
            text,
            "\n{} of {} killed, {} of them only when disturbed; {:.0} s",
            kills.clone().count(),
            self.mutants.len(),
            kills.filter(|kill| kill.point.is_some()).count(),
            self.seconds
        );
        text
    }
}
