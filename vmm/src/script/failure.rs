//! What is said of a script that failed: where, why, what the machine looks like, and how to see it again.

use std::fmt::Write;

use rhai::EvalAltResult;

use super::{Script, SharedStage};
use crate::config::{Configuration, Preempt};
use crate::inspect::View;

/// Longest view that is shown, lines.
const LINES_MAX: usize = 40;

/// The failure for people; none if the script just ended itself.
pub fn describe(script: &Script, error: &EvalAltResult, stage: &SharedStage) -> Option<String> {
    if let EvalAltResult::Exit(..) = error {
        return None;
    }
    let (inner, line, place) = innermost(error);
    let mut text = match line {
        Some(line) => format!("{}:{line}: {}", script.name, message(inner)),
        None => format!("{}: {}", script.name, message(inner)),
    };
    if let Some(place) = place {
        let _ = write!(text, "\n  in {place}");
    }
    let source = line.and_then(|line| script.source.lines().nth(line.checked_sub(1)?));
    if let Some(source) = source {
        let _ = write!(text, "\n  | {}", source.trim());
    }
    let stage = stage.borrow();
    let Some(machine) = &stage.machine else {
        return Some(text);
    };
    let view = stage.view.clone().unwrap_or(View::Threads);
    match machine.inspect(&view) {
        Ok(report) => {
            let _ = write!(text, "\nThe machine, {}:", name(&view));
            for line in report.text.trim_end().lines().take(LINES_MAX) {
                let _ = write!(text, "\n  {}", line.trim_end());
            }
        }
        Err(error) => {
            let _ = write!(text, "\nThe machine cannot be looked into: {error}");
        }
    }
    let console = machine.console();
    let last = console.lines().last().unwrap_or_default();
    if !last.is_empty() {
        let _ = write!(text, "\nIts console ends with: {last}");
    }
    let _ = write!(
        text,
        "\nAgain: {}",
        command(&script.name, machine.configuration, machine.vcpus)
    );
    Some(text)
}

/// The command that runs a script again in the same configuration.
fn command(script: &str, configuration: Configuration, vcpus: u32) -> String {
    let preempt = match configuration.preempt() {
        Preempt::None => "none",
        Preempt::Partial => "partial",
        Preempt::Full => "full",
    };
    let model = configuration.model().name();
    format!("flukevm test --model {model} --preempt {preempt} --vcpus {vcpus} {script}")
}

/// The error that the others are about, the line of the script's own that led to it, and the place in a module
/// where it is, if it is in one.
fn innermost(error: &EvalAltResult) -> (&EvalAltResult, Option<usize>, Option<String>) {
    let line = error.position().line();
    let (module, inner) = match error {
        EvalAltResult::ErrorInFunctionCall(_, module, inner, _) => (module, inner),
        EvalAltResult::ErrorInModule(module, inner, _) => (module, inner),
        _ => return (error, line, None),
    };
    let (inner, inner_line, place) = innermost(inner);
    match module.is_empty() {
        true => (inner, inner_line.or(line), place),
        false => {
            let number = inner_line.map_or(String::new(), |line| format!(":{line}"));
            (inner, line, place.or(Some(format!("{module}{number}"))))
        }
    }
}

fn message(error: &EvalAltResult) -> String {
    match error {
        EvalAltResult::ErrorRuntime(value, _) | EvalAltResult::ErrorTerminated(value, _) => {
            value.to_string()
        }
        _ => {
            // Without the place, which has been said.
            let mut error = error.to_string();
            if let Some(at) = error.rfind(" (line ") {
                error.truncate(at);
            }
            error
        }
    }
}

/// The words that give a view.
fn name(view: &View) -> String {
    match view {
        View::Thread { id } => format!("thread {id}"),
        View::Spaces { id: Some(id) } => format!("space {id}"),
        View::Stack { cpu } => format!("stack of CPU {cpu}"),
        view => format!("{view:?}").to_lowercase(),
    }
}
