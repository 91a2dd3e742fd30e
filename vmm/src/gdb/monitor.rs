//! `monitor` commands: the views of `inspect`, and catching calls by name.

use clap::Parser;
use fluke_abi::entry::{Entry, TABLE};

use super::calls::Numbers;
use super::debuggee::Debuggee;
use crate::inspect::{self, View};

/// Looks into the stopped machine, and catches its calls.
#[derive(Debug, Parser)]
#[command(
    name = "monitor",
    no_binary_name = true,
    disable_help_flag = true,
    max_term_width = 100
)]
enum Monitor {
    #[command(flatten)]
    Look(View),
    /// Stop where the kernel is asked to make a call, and where that is done; without names, list
    /// the calls that are caught so.
    Catch {
        /// Names of entry points.
        #[arg(value_parser = entry)]
        names: Vec<Entry>,
    },
    /// Do so no more; without names, for none.
    Uncatch {
        /// Names of entry points.
        #[arg(value_parser = entry)]
        names: Vec<Entry>,
    },
}

fn entry(name: &str) -> Result<Entry, String> {
    let row = TABLE.iter().find(|row| row.name == name);
    let entry = row.and_then(|row| Entry::from_number(row.number));
    entry.ok_or_else(|| format!("the kernel has no entry point `{name}`; see `flukevm api`"))
}

/// What a command says.
pub fn run(debuggee: &mut Debuggee, command: &str) -> String {
    match Monitor::try_parse_from(command.split_whitespace()) {
        Ok(Monitor::Look(view)) => {
            let machine = debuggee.machine();
            let seen = machine.and_then(|machine| inspect::look(&machine, &view));
            seen.map_or_else(|error| format!("error: {error}"), |report| report.text)
        }
        Ok(Monitor::Catch { names }) if !names.is_empty() && !debuggee.can_catch() => {
            "error: catching calls takes two debug registers; delete breakpoints".into()
        }
        Ok(Monitor::Catch { names }) => {
            for entry in names {
                debuggee.calls.by_name.add(entry as u64);
            }
            caught(debuggee)
        }
        Ok(Monitor::Uncatch { names }) => {
            if names.is_empty() {
                debuggee.calls.by_name = Numbers::default();
            }
            for entry in names {
                debuggee.calls.by_name.remove(entry as u64);
            }
            caught(debuggee)
        }
        Err(error) => error.to_string(),
    }
}

fn caught(debuggee: &Debuggee) -> String {
    let names: Vec<_> = debuggee
        .calls
        .by_name
        .entries()
        .map(|entry| entry.row().name)
        .collect();
    match names.is_empty() {
        true => "No calls are caught by name.".into(),
        false => format!("Caught: {}", names.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_commands_are_consistent() {
        Monitor::command().debug_assert();
        let parse = |command: &str| Monitor::try_parse_from(command.split_whitespace());
        assert!(matches!(parse("threads"), Ok(Monitor::Look(View::Threads))));
        assert!(matches!(
            parse("thread 3"),
            Ok(Monitor::Look(View::Thread { id: 3 }))
        ));
        let Ok(Monitor::Catch { names }) = parse("catch cond_wait") else {
            panic!("not caught");
        };
        assert_eq!(names, [Entry::cond_wait]);
        for wrong in ["", "catch open", "threads 3", "--version", "-h"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        assert!(
            parse("help")
                .unwrap_err()
                .to_string()
                .contains("Run queues")
        );
    }
}
