//! Scripts: scenarios in [Rhai](https://rhai.rs) that pause a machine at conditions and look into it.
//!
//! A script makes machines, lets them run up to [pause conditions](crate::condition), looks at what
//! `flukevm inspect` shows, changes things, and says by assertions what must be. [`run`] runs one; every verb
//! is a method of [`crate::vm::Vm`] too. The verbs are in `docs/scripts.md`.
//!
//! No script runs for ever: each wait for a machine has a limit, and so has the whole.

mod command;
mod conditions;
mod failure;
mod verbs;

pub use command::{TestArgs, main};

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use rhai::module_resolvers::FileModuleResolver;
use rhai::{AST, Engine, EvalAltResult, Scope, Token};
use serde::Serialize;

use crate::config::{Configuration, Model, Preempt};
use crate::error::Error;
use crate::inspect::View;
use verbs::Handle;

/// How long a script may take.
pub const PATIENCE: Duration = Duration::from_secs(300);
/// How long it waits for a machine at a time, if it does not say.
const WAIT: Duration = Duration::from_secs(60);
/// Steps of the language that a script may take: seconds of them.
const OPERATIONS_MAX: u64 = 100_000_000;

/// How deep expressions and calls may be nested.
const EXPRESSION_DEPTH: usize = 64;
const CALL_DEPTH: usize = 32;

/// How the machines of a script are made, where it does not say itself; or whatever it says.
#[derive(Clone, Copy, Debug, Default)]
pub struct Settings {
    /// Execution model.
    pub model: Option<Model>,
    /// Preemption level.
    pub preempt: Option<Preempt>,
    /// Number of vCPUs.
    pub vcpus: Option<u32>,
    /// How long the script may take; [`PATIENCE`] if left out.
    pub patience: Option<Duration>,
}

impl Settings {
    /// That configuration.
    pub fn of(configuration: Configuration) -> Self {
        Self {
            model: Some(configuration.model()),
            preempt: Some(configuration.preempt()),
            ..Self::default()
        }
    }
}

/// How a script ended.
#[derive(Clone, Debug, Serialize)]
pub struct Ended {
    /// Why it failed, with what can be seen of the machine; none if it did not.
    pub failure: Option<String>,
    /// Configuration of the machine that it made last.
    pub configuration: Option<String>,
    /// Its vCPUs.
    pub vcpus: Option<u32>,
    /// How long it took, milliseconds.
    pub elapsed_ms: f64,
}

/// What a script's functions share.
struct Stage {
    settings: Settings,
    started: Instant,
    /// The machine made last.
    machine: Option<Handle>,
    /// What the script looked at last.
    view: Option<View>,
}

impl Stage {
    /// How long a wait may take: that, or what the script has left.
    fn limit(&self, wanted: Duration) -> Duration {
        let patience = self.settings.patience.unwrap_or(PATIENCE);
        wanted.min(patience.saturating_sub(self.started.elapsed()))
    }
}

type SharedStage = Rc<RefCell<Stage>>;

/// Result of a script's function.
type Fallible<T> = Result<T, Box<EvalAltResult>>;

/// A script that has been read.
pub struct Script {
    name: String,
    source: String,
    ast: AST,
}

impl Script {
    /// Reads a script.
    ///
    /// # Errors
    /// If the file cannot be read, or is no script; the message has the line.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let source = std::fs::read_to_string(path).map_err(|source| Error::File {
            path: path.into(),
            source,
        })?;
        Self::parse(&path.display().to_string(), source)
    }

    /// A script of that name from its text.
    ///
    /// # Errors
    /// If it is none; the message has the line.
    pub fn parse(name: &str, source: String) -> Result<Self, Error> {
        let ast = engine().compile(&source).map_err(|error| {
            let line = error.position().line().unwrap_or(1);
            Error::Config(format!("{name}:{line}: {}", error.err_type()))
        })?;
        Ok(Self {
            name: name.into(),
            source,
            ast,
        })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// The language, in which `thread` and `call` are names like others.
fn engine() -> Engine {
    let mut engine = Engine::new();
    // The same in debug builds, where they are less.
    engine.set_max_expr_depths(EXPRESSION_DEPTH, EXPRESSION_DEPTH);
    engine.set_max_call_levels(CALL_DEPTH);
    #[allow(deprecated, reason = "so marked because it may change")]
    engine.on_parse_token(|token, _, _| match token {
        Token::Reserved(name) if *name == "thread" || *name == "call" => Token::Identifier(name),
        token => token,
    });
    engine
}

/// Runs a script. What it prints goes to standard output.
pub fn run(script: &Script, settings: Settings) -> Ended {
    let started = Instant::now();
    let stage = Rc::new(RefCell::new(Stage {
        settings,
        started,
        machine: None,
        view: None,
    }));
    let mut engine = engine();
    engine.set_max_operations(OPERATIONS_MAX);
    let patience = settings.patience.unwrap_or(PATIENCE);
    engine.on_progress(move |_| {
        let late = started.elapsed() > patience;
        late.then(|| {
            format!(
                "it took longer than {}",
                humantime::format_duration(patience)
            )
            .into()
        })
    });
    let directory = Path::new(&script.name).parent();
    let modules = FileModuleResolver::new_with_path(directory.unwrap_or(Path::new("")));
    engine.set_module_resolver(modules);
    engine.on_print(|text| println!("{text}"));
    conditions::register(&mut engine);
    verbs::register(&mut engine, &stage);
    let result = engine.run_ast_with_scope(&mut Scope::new(), &script.ast);
    let failure = result
        .err()
        .and_then(|error| failure::describe(script, &error, &stage));
    let stage = stage.borrow();
    let machine = stage.machine.as_ref();
    Ended {
        failure,
        configuration: machine.map(|machine| machine.configuration.to_string()),
        vcpus: machine.map(|machine| machine.vcpus),
        elapsed_ms: started.elapsed().as_secs_f64() * 1e3,
    }
}
