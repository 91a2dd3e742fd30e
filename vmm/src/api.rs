//! `flukevm api`: the table of entry points for people and programs, and how its classes count
//! against OSDI '99 table 1.

use std::fmt::Write;

use comfy_table::{CellAlignment, Table, presets};
use fluke_abi::code::{Insanity, Status};
use fluke_abi::entry::{Class, Entry, Row, TABLE};
use serde::Serialize;

/// The classes with their names, and how many entry points of each OSDI '99 table 1 counts.
const PAPER: [(Class, &str, usize); 4] = [
    (Class::Trivial, "trivial", 8),
    (Class::Short, "short", 68),
    (Class::Long, "long", 8),
    (Class::MultiStage, "multi-stage", 23),
];

/// The whole API.
#[derive(Serialize)]
pub struct Api {
    /// Every entry point, in order of numbers.
    entry_points: Vec<EntryPoint>,
    /// Counts by class.
    classes: Vec<ClassCount>,
}

/// A row of the table.
#[derive(Serialize)]
struct EntryPoint {
    number: u16,
    name: &'static str,
    class: &'static str,
    object: &'static str,
    parameters: Vec<Parameter>,
    /// Statuses and insanities it can end with, `Success` aside.
    errors: Vec<&'static str>,
    built: bool,
    restart_points: Vec<&'static str>,
    /// Why the paper does not count it.
    not_in_paper: Option<&'static str>,
    doc: &'static str,
}

#[derive(Serialize)]
struct Parameter {
    name: &'static str,
    /// Its type, in Rust.
    r#type: String,
}

#[derive(Serialize)]
struct ClassCount {
    class: &'static str,
    /// Entry points of the table.
    here: usize,
    /// Those of them that the paper counts too, by the reading of `not_in_paper`.
    counted: usize,
    /// OSDI '99 table 1.
    paper: usize,
    not_built: usize,
}

/// Why OSDI '99 table 1 does not count an entry point; `None` if it does. The paper names none, so
/// this is a reading (fluke-api 15.2): of the manual's 112, those that it calls preliminary and one
/// that is two in C.
fn not_in_paper(row: &Row) -> Option<&'static str> {
    use Entry::*;
    match Entry::from_number(row.number)? {
        thread_get_client | thread_get_server | thread_set_client | thread_set_server => {
            Some("preliminary in the manual")
        }
        ipc_setup_wait_receive => Some("records what a server is, then is ipc_wait_receive"),
        mapping_reference => Some("not in the manual"),
        thread_sleep | clock_read | cpu_self | machine_exit | machine_census => {
            Some("ours, for what Fluke leaves to servers")
        }
        machine_tell | machine_listen => Some("ours, for tests from the host"),
        supervisor_call => Some("ours, for the kernel's own drivers"),
        _ => None,
    }
}

fn class_name(class: Class) -> &'static str {
    let mut classes = PAPER.iter().filter(|(paper, ..)| *paper == class);
    classes.next().map_or("", |(_, name, _)| name)
}

impl EntryPoint {
    fn new(row: &'static Row) -> Self {
        let statuses = Status::ALL.iter().copied();
        let statuses = statuses.filter(|&s| s != Status::Success && row.may_return(s));
        let insanities = Insanity::ALL.iter().copied();
        let insanities = insanities.filter(|&insanity| row.may_raise(insanity));
        Self {
            number: row.number,
            name: row.name,
            class: class_name(row.class),
            object: row.object,
            parameters: row
                .parameters
                .iter()
                .map(|&(name, r#type)| Parameter {
                    name,
                    // As `stringify!` spells it: `* mut T`.
                    r#type: r#type.replace("* ", "*"),
                })
                .collect(),
            errors: statuses
                .map(Status::name)
                .chain(insanities.map(Insanity::name))
                .collect(),
            built: row.built,
            restart_points: row.restart_points.iter().map(|e| e.row().name).collect(),
            not_in_paper: not_in_paper(row),
            doc: row.doc,
        }
    }
}

impl Api {
    /// What the table says.
    pub fn new() -> Self {
        let count = |class, which: fn(&Row) -> bool| {
            let rows = TABLE.iter().filter(|row| row.class == class);
            rows.filter(|row| which(row)).count()
        };
        let classes = PAPER.map(|(class, name, paper)| ClassCount {
            class: name,
            here: count(class, |_| true),
            counted: count(class, |row| not_in_paper(row).is_none()),
            paper,
            not_built: count(class, |row| !row.built),
        });
        Self {
            entry_points: TABLE.iter().map(EntryPoint::new).collect(),
            classes: classes.into(),
        }
    }

    /// Of each class: its name, how many entry points there are, how many of them the paper counts too, and how
    /// many the paper has.
    pub fn classes(&self) -> impl Iterator<Item = (&'static str, usize, usize, usize)> {
        self.classes
            .iter()
            .map(|count| (count.class, count.here, count.counted, count.paper))
    }

    /// As text: the entry points, the counts, and the differences by name.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        for entry in &self.entry_points {
            // Writing to a string cannot fail.
            let _ = entry.describe(&mut text);
        }
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header(["Class", "Here", "As the paper", "Paper", "Not built"]);
        let total = |f: fn(&ClassCount) -> usize| self.classes.iter().map(f).sum::<usize>();
        let all = ClassCount {
            class: "all",
            here: total(|c| c.here),
            counted: total(|c| c.counted),
            paper: total(|c| c.paper),
            not_built: total(|c| c.not_built),
        };
        for c in self.classes.iter().chain([&all]) {
            let numbers = [c.here, c.counted, c.paper, c.not_built].map(|n| n.to_string());
            table.add_row([c.class.to_string()].into_iter().chain(numbers));
        }
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        for line in table.to_string().lines() {
            let _ = writeln!(text, "{}", line.trim());
        }
        let _ = writeln!(text, "\nNot in the paper's table 1 (docs/api.md):");
        for entry in &self.entry_points {
            if let Some(why) = entry.not_in_paper {
                let _ = writeln!(text, "  {} ({}): {why}", entry.name, entry.class);
            }
        }
        text
    }
}

impl Default for Api {
    fn default() -> Self {
        Self::new()
    }
}

impl EntryPoint {
    fn describe(&self, text: &mut String) -> std::fmt::Result {
        let parameters = self.parameters.iter();
        let parameters: Vec<_> = parameters
            .map(|p| format!("{}: {}", p.name, p.r#type))
            .collect();
        let built = if self.built { "" } else { ", not built" };
        writeln!(
            text,
            "{:3} {}({})\n    {}, {}{built}. {}",
            self.number,
            self.name,
            parameters.join(", "),
            self.object,
            self.class,
            self.doc,
        )?;
        if !self.errors.is_empty() {
            writeln!(text, "    Errors: {}", self.errors.join(", "))?;
        }
        if !self.restart_points.is_empty() {
            writeln!(text, "    Restarts as: {}", self.restart_points.join(", "))?;
        }
        writeln!(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_paper_counts_is_as_many_as_it_counts() {
        for count in Api::new().classes {
            assert_eq!(count.counted, count.paper, "{}", count.class);
        }
    }

    #[test]
    fn the_text_has_every_entry_point_and_the_counts() {
        let text = Api::new().to_text();
        for row in TABLE {
            assert!(text.contains(&format!("{:3} {}(", row.number, row.name)));
        }
        assert!(text.contains("Restarts as: mutex_lock\n"), "{text}");
        assert!(text.contains("Errors: MutexHeld, NoObject, NotMutex, NotAligned\n"));
    }
}
