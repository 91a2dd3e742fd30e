//! The kernel's pool: room for objects, pages for page tables, stacks.

use std::fmt::Write;

use fluke_abi::layout::PAGE_SIZE;
use serde::Serialize;

use super::kernel::Kernel;
use super::table::{notes, report, table, trimmed};
use super::{Report, Result};

/// Room for objects of a type.
#[derive(Serialize)]
struct Room {
    kind: String,
    /// Objects alive.
    live: u64,
    /// Most that ever were at the same time.
    most: u64,
    capacity: u64,
    /// Bytes of each.
    bytes: u64,
}

/// Pages for page tables.
#[derive(Serialize)]
struct Pages {
    /// In use.
    live: u64,
    /// Used once, and free again.
    free: u64,
    /// Never used.
    fresh: u64,
    /// Of those in use, the top tables of destroyed spaces that some CPU still had loaded.
    husks: u64,
}

/// Kernel stacks of threads.
#[derive(Serialize)]
struct Stacks {
    /// Slots that were ever used, those of the CPUs included.
    used: u64,
    slots: u64,
}

#[derive(Serialize)]
struct Pool {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    notes: Vec<String>,
    objects: Vec<Room>,
    pages: Pages,
    stacks: Stacks,
}

/// The view.
pub fn view(kernel: &Kernel<'_>) -> Result<Report> {
    let mut notes = notes(kernel)?;
    let mut objects = Vec::new();
    for (kind, arena) in &kernel.arenas {
        objects.push(Room {
            kind: kind.clone(),
            live: arena.live,
            most: arena.fresh,
            capacity: arena.capacity,
            bytes: arena.stride()?,
        });
    }
    let frames = kernel.kernel.field("frames")?;
    let page = |field: &str| frames.field(field)?.int();
    let fresh = page("end")?.saturating_sub(page("fresh")?) / PAGE_SIZE;
    let mut chain = |what: &str, first| {
        let (length, whole) = chain(kernel, first);
        if !whole {
            notes.push(format!("the list of {what} is broken after {length}"));
        }
        length
    };
    let free = chain("free pages", page("free")?);
    let husks = chain("husks", kernel.kernel.field("husks")?.int()?);
    let stacks = kernel.kernel.field("stacks")?;
    let pool = Pool {
        pages: Pages {
            live: page("live")?,
            free,
            fresh,
            husks,
        },
        stacks: Stacks {
            used: stacks.field("fresh")?.int()?,
            slots: stacks.field("end")?.int()?,
        },
        notes,
        objects,
    };
    let mut text = String::new();
    for note in &pool.notes {
        let _ = writeln!(text, "note: {note}");
    }
    let mut rows = table();
    rows.set_header(["TYPE", "LIVE", "MOST", "ROOM FOR", "BYTES EACH"]);
    for room in &pool.objects {
        let numbers = [room.live, room.most, room.capacity, room.bytes];
        let numbers = numbers.map(|number| number.to_string());
        rows.add_row([room.kind.clone()].into_iter().chain(numbers));
    }
    let Pages {
        live, free, fresh, ..
    } = pool.pages;
    rows.add_row([
        "page-table page".into(),
        live.to_string(),
        live.saturating_add(free).to_string(),
        live.saturating_add(free + fresh).to_string(),
        PAGE_SIZE.to_string(),
    ]);
    text.push_str(&trimmed(&rows));
    let Stacks { used, slots } = pool.stacks;
    let _ = writeln!(
        text,
        "\n{used} of {slots} kernel stacks were ever used. Of the page-table pages, {} are top tables of destroyed spaces.",
        pool.pages.husks
    );
    report(text, &pool)
}

/// Length of a chain of pages, each of which names the next in its first word, and whether it ends.
fn chain(kernel: &Kernel<'_>, first: u64) -> (u64, bool) {
    let mut next = first;
    let mut length = 0;
    while next != 0 {
        let mut word = [0; 8];
        let read = kernel.guest.memory.read(next, &mut word);
        // No machine has more pages.
        if read.is_err() || length > 1 << 20 {
            return (length, false);
        }
        next = u64::from_le_bytes(word);
        length += 1;
    }
    (length, true)
}
