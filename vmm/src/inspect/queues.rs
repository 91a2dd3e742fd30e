//! Who is to run: run queues of the CPUs, sleepers, and those that want the kernel.

use std::fmt::Write;

use serde::Serialize;

use super::kernel::{Kernel, Members, Name};
use super::table::{notes, report, table, trimmed};
use super::{Error, Report, Result};

/// Ready threads of a CPU at one priority.
#[derive(Serialize)]
struct Ready {
    cpu: u64,
    priority: u64,
    threads: Members,
}

/// A thread that sleeps by the clock.
#[derive(Serialize)]
struct Sleeper {
    thread: Name,
    /// When it wakes, nanoseconds since boot.
    deadline: u64,
}

#[derive(Serialize)]
struct Queues {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    notes: Vec<String>,
    ready: Vec<Ready>,
    sleepers: Vec<Sleeper>,
    /// Threads that wait for the kernel, at preemption level full.
    lockers: Members,
}

/// The view.
pub fn view(kernel: &Kernel<'_>) -> Result<Report> {
    let mut queues = Queues {
        notes: notes(kernel)?,
        ready: Vec::new(),
        sleepers: Vec::new(),
        lockers: kernel.members(kernel.scheduler.field("lockers")?)?,
    };
    let (first, cpus) = kernel.scheduler.field("cpus")?.elements()?;
    for cpu in 0..cpus {
        let queue = first.nth(cpu)?.field("ready")?;
        let occupied = queue.field("occupied")?.int()?;
        let (first, priorities) = queue.field("queues")?.elements()?;
        for priority in (0..priorities).rev() {
            let threads = kernel.members(first.nth(priority)?)?;
            let empty = threads.names.is_empty() && threads.error.is_none();
            if empty == (occupied >> priority & 1 == 1) {
                queues.notes.push(format!(
                    "the queue of priority {priority} on CPU {cpu} is marked wrongly"
                ));
            }
            if !empty {
                queues.ready.push(Ready {
                    cpu,
                    priority,
                    threads,
                });
            }
        }
    }
    for sleeper in kernel.queue(kernel.scheduler.field("sleepers")?)? {
        let described = sleeper.and_then(|entity| {
            let (state, _) = entity.value.field("state")?.variant()?;
            let thread = kernel.thread_of(entity.value)?.name;
            match state.as_str() {
                "Asleep" => Ok(Sleeper {
                    thread,
                    deadline: entity.value.field("deadline")?.int()?,
                }),
                other => Err(Error::Corrupt(format!(
                    "{thread} is among the sleepers, and is {}",
                    other.to_lowercase()
                ))),
            }
        });
        match described {
            Ok(sleeper) => queues.sleepers.push(sleeper),
            Err(refused @ Error::Image(_)) => return Err(refused),
            Err(error) => queues.notes.push(error.to_string()),
        }
    }
    report(text(&queues), &queues)
}

fn text(queues: &Queues) -> String {
    let mut text = String::new();
    for note in &queues.notes {
        let _ = writeln!(text, "note: {note}");
    }
    let mut rows = table();
    rows.set_header(["QUEUE", "THREADS"]);
    for Ready {
        cpu,
        priority,
        threads,
    } in &queues.ready
    {
        rows.add_row([
            format!("CPU {cpu}, priority {priority}"),
            threads.to_string(),
        ]);
    }
    for Sleeper { thread, deadline } in &queues.sleepers {
        let (s, ns) = (deadline / 1_000_000_000, deadline % 1_000_000_000);
        rows.add_row([format!("asleep until {s}.{ns:09} s"), thread.to_string()]);
    }
    if !queues.lockers.names.is_empty() || queues.lockers.error.is_some() {
        rows.add_row(["want the kernel".into(), queues.lockers.to_string()]);
    }
    if rows.row_iter().len() == 0 {
        return text + "No thread is ready, asleep by the clock, or wants the kernel.\n";
    }
    text + trimmed(&rows).as_str()
}
