//! The command line.
//!
//! The guest's console is standard output, everything of ours is standard error. Exit statuses are
//! in [`crate::stop`].

use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use serde::Serialize;
use tracing_subscriber::EnvFilter;

use crate::api::Api;
use crate::bench::{self, command::BenchArgs};
use crate::checkpoint::{self, Checkpoints};
use crate::config::{
    Configuration, ConsoleSink, GuestFile, MEMORY_DEFAULT, Model, PROGRAM_DEFAULT, Preempt, Size,
    VmConfig, name_and_path,
};
use crate::count::{self, Visits};
use crate::crash::Crash;
use crate::error::{Error, STATUS_FAILURE, STATUS_MISUSE};
use crate::gdb::{self, address::Address};
use crate::image;
use crate::inspect::{Report, View};
use crate::profile;
use crate::pvh::command::{self as pvh, ImageArgs};
use crate::remote::{self, Answer, Request, client};
use crate::script;
use crate::snapshot::disk;
use crate::snapshot::plan::SavePlan;
use crate::stats::{self, VcpuStats};
use crate::verify::{self, command::VerifyArgs};
use crate::vm::{Outcome, Vm};

/// Environment variable with the log filter, in the syntax of `tracing-subscriber`.
const LOG_VARIABLE: &str = "FLUKEVM_LOG";
/// How often `--stats` looks at what a vCPU is doing.
const SAMPLING: Duration = Duration::from_millis(5);

/// Boots the Fluke kernel on KVM.
#[derive(Debug, Parser)]
#[command(name = "flukevm", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Commands,
    /// Log more: -v the kernel's log and what happens, -vv details.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Log errors only.
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
}

#[derive(Debug, Subcommand)]
enum Commands {
    /// Run a guest program; its exit status is the command's.
    Run(RunArgs),
    /// Let a paused machine run on, or go on with one that was saved; that one's exit status is the
    /// command's.
    Resume(ResumeArgs),
    /// Stop all vCPUs of a machine between two instructions.
    Pause {
        /// Name of the machine.
        name: String,
    },
    /// Let one vCPU of a paused machine execute instructions; the others stay where they are.
    Step {
        /// Name of the machine.
        name: String,
        /// Number of instructions.
        #[arg(default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
        count: u32,
        /// Number of the vCPU.
        #[arg(long, value_name = "N", default_value_t = 0)]
        vcpu: u32,
    },
    /// Show what is in a machine. One that runs is paused for that long.
    Inspect {
        /// Name of the machine, or directory that it was saved in.
        machine: String,
        /// What to show.
        #[command(subcommand)]
        view: View,
        /// Print JSON.
        #[arg(long, global = true)]
        json: bool,
    },
    /// List the machines that run, by the names that other commands take.
    Ps {
        /// Print one JSON array.
        #[arg(long)]
        json: bool,
    },
    /// Run scripts that pause a machine and look into it; the exit status is 0 if all passed.
    Test(script::TestArgs),
    /// List the entry points of the kernel, and count them against the paper's.
    Api {
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Write the machine that `run` would build as a kernel image that other VMMs can boot.
    Image(ImageArgs),
    /// Prove that system calls can be taken apart at any instruction, by doing it.
    Verify(VerifyArgs),
    /// Measure what the paper measured, and more, in each configuration.
    Bench(BenchArgs),
    /// Show what this host's KVM can do, and what that means.
    Doctor {
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Args)]
struct RunArgs {
    /// Number of vCPUs; more than the host has cores are fine.
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Machine")]
    vcpus: u32,
    /// Memory, such as 64M or 1G.
    #[arg(long, value_name = "SIZE", default_value_t = Size(MEMORY_DEFAULT),
          help_heading = "Machine")]
    mem: Size,
    /// Execution model of the kernel.
    #[arg(long, value_enum, default_value_t = Model::Interrupt, help_heading = "Kernel")]
    model: Model,
    /// How far kernel code can be preempted.
    #[arg(long, value_enum, default_value_t = Preempt::None, value_name = "LEVEL",
          help_heading = "Kernel")]
    preempt: Preempt,
    /// Hand a file to the guest under a name; may be repeated. `builtin:hello` is the built-in program
    /// hello.
    #[arg(long, value_name = "NAME=PATH", value_parser = name_and_path)]
    file: Vec<(String, String)>,
    /// Write checkpoints of the program to a file: when it asks for it, and as --checkpoint-after says.
    #[arg(long, value_name = "FILE", help_heading = "Checkpoints")]
    checkpoint_to: Option<PathBuf>,
    /// Write one after this time, such as 500ms.
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration,
          requires = "checkpoint_to", help_heading = "Checkpoints")]
    checkpoint_after: Option<Duration>,
    /// Let the program in a checkpoint go on: on other CPUs, in another kernel, as may be.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["program", "file"],
          help_heading = "Checkpoints")]
    restore_from: Option<PathBuf>,
    #[command(flatten)]
    common: CommonArgs,
    /// Step through the kernel and print the instructions it executes for each entry point; slow,
    /// and for one vCPU only.
    #[arg(long, conflicts_with = "snapshot_to")]
    count: bool,
    /// Step through the kernel and write where its instructions are: folded stacks to FILE.folded, a flame
    /// graph to any other FILE. As --count otherwise.
    #[arg(long, value_name = "FILE", conflicts_with = "snapshot_to")]
    profile: Option<PathBuf>,
    /// Wait for gdb to connect, and let it debug the machine; at a port of the loopback interface, or a
    /// socket, whose path has a `/` in it.
    #[arg(long, value_name = "ADDR", num_args = 0..=1, require_equals = true,
          default_missing_value = gdb::address::DEFAULT,
          conflicts_with_all = ["count", "profile", "snapshot_to"])]
    gdb: Option<Address>,
    /// Name of a built-in guest program, or path of an ELF file built against libfluke; what
    /// follows are the program's own arguments.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "PROGRAM [ARGS]",
          default_value = PROGRAM_DEFAULT)]
    program: Vec<String>,
}

#[derive(Debug, Args)]
struct ResumeArgs {
    #[command(flatten)]
    common: CommonArgs,
    /// Name of the machine, or directory that it was saved in. The options are for a saved one.
    #[arg(value_name = "NAME|DIR")]
    machine: String,
}

/// What goes for every machine, however it starts.
#[derive(Debug, Args)]
struct CommonArgs {
    /// Name by which other commands reach the machine; the number of its process, if left out.
    #[arg(long, value_name = "NAME", value_parser = remote::check_name)]
    name: Option<String>,
    /// Stop the machine after this time, such as 10s or 2m.
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    timeout: Option<Duration>,
    /// Print exits by cause and vCPU, time by mode, and the kernel's counters.
    #[arg(long)]
    stats: bool,
    /// Print one JSON object with the result; the guest's console goes to standard error.
    #[arg(long)]
    json: bool,
    /// Save the machine in this directory, to go on with `flukevm resume`: after
    /// --snapshot-after, and on SIGUSR1. It runs on all the same.
    #[arg(long, value_name = "DIR", help_heading = "Snapshots")]
    snapshot_to: Option<PathBuf>,
    /// When to save it, such as 500ms.
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration,
          requires = "snapshot_to", help_heading = "Snapshots")]
    snapshot_after: Option<Duration>,
}

/// What `run --json` and `resume --json` print.
#[derive(Serialize)]
struct RunReport<'a> {
    stop: &'static str,
    message: String,
    status: u8,
    crash: Option<&'a Crash>,
    elapsed_ms: f64,
    time_to_first_user_ms: Option<f64>,
    vcpus: u32,
    model: Option<Model>,
    preempt: Option<Preempt>,
    stats: &'a [VcpuStats],
    counts: &'a [Visits],
}

/// The whole command.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if error.use_stderr() => {
            eprintln!("{}; try '--help'", one_line(&error.to_string()));
            return ExitCode::from(STATUS_MISUSE);
        }
        // Help or the version, as asked for.
        Err(help) => help.exit(),
    };
    log_to_stderr(cli.verbose, cli.quiet);
    let status = match cli.command {
        Commands::Run(args) => ended(run(&args)),
        Commands::Resume(args) => ended(resume(&args)),
        Commands::Pause { name } => asked(&name, &Request::Pause, done),
        Commands::Step { name, count, vcpu } => asked(&name, &Request::Step { vcpu, count }, done),
        Commands::Inspect {
            machine,
            view,
            json,
        } => inspect(&machine, view, json),
        Commands::Ps { json } => status(ps(json)),
        Commands::Test(args) => ended(script::main(&args)),
        Commands::Api { json } => status(api(json)),
        Commands::Image(args) => ended(pvh::command(&args)),
        Commands::Verify(args) => ended(verify::command::command(&args)),
        Commands::Bench(args) => ended(bench::command::command(&args)),
        Commands::Doctor { json } => status(doctor(json)),
    };
    ExitCode::from(status)
}

/// The exit status of a command that runs a machine; its error is printed.
fn ended(result: Result<u8, Error>) -> u8 {
    result.unwrap_or_else(|error| {
        eprintln!("error: {error}");
        error.status()
    })
}

/// The exit status of a command that has none of its own; its error is printed.
fn status(result: anyhow::Result<()>) -> u8 {
    match result {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("error: {error:#}");
            STATUS_FAILURE
        }
    }
}

/// What a parser's message says before it goes on to usage and hints, on one line.
fn one_line(message: &str) -> String {
    let said = message
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:"));
    let said = said.filter(|line| !line.is_empty() && !line.starts_with("For more information"));
    said.collect::<Vec<_>>().join(" ")
}

fn log_to_stderr(verbose: u8, quiet: bool) {
    let default = match (quiet, verbose) {
        (true, _) => "error",
        (false, 0) => "warn",
        (false, 1) => "info",
        (false, 2) => "debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_env(LOG_VARIABLE).unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(io::stderr().is_terminal())
        .with_writer(io::stderr)
        .init();
}

fn run(args: &RunArgs) -> Result<u8, Error> {
    let configuration = Configuration::new(args.model, args.preempt)?;
    let mut config = machine(args, configuration)?;
    config.vcpus = args.vcpus;
    config.memory = args.mem.0;
    config.count = args.count || args.profile.is_some();
    config.profile = args.profile.is_some();
    run_machine(
        config,
        &args.common,
        args.gdb.as_ref(),
        args.profile.as_deref(),
    )
}

fn resume(args: &ResumeArgs) -> Result<u8, Error> {
    if is_saved(&args.machine) {
        let snapshot = disk::load(Path::new(&args.machine))?;
        return run_machine(VmConfig::snapshot(snapshot), &args.common, None, None);
    }
    if args.common.is_any() {
        return Err(Error::Config(format!(
            "the options of resume are for saved machines; write `./{}` if that is a directory",
            args.machine
        )));
    }
    Ok(asked(&args.machine, &Request::Resume, done))
}

/// Whether a user means a directory that a machine was saved in, and not the name of one that runs.
fn is_saved(machine: &str) -> bool {
    machine.contains('/') || !remote::runs(machine) && Path::new(machine).is_dir()
}

impl CommonArgs {
    /// Whether any was given.
    fn is_any(&self) -> bool {
        let Self {
            name,
            timeout,
            stats,
            json,
            snapshot_to,
            snapshot_after,
        } = self;
        let given = [name.is_some(), timeout.is_some(), *stats, *json];
        given.contains(&true) || snapshot_to.is_some() || snapshot_after.is_some()
    }
}

/// Runs a machine as the command line says, under a debugger if there is an address for one; returns the
/// exit status.
fn run_machine(
    mut config: VmConfig,
    args: &CommonArgs,
    debugger: Option<&Address>,
    profile: Option<&Path>,
) -> Result<u8, Error> {
    config.timeout = args.timeout;
    config.signals = true;
    config.sampling = args.stats.then_some(SAMPLING);
    config.console = match args.json {
        true => ConsoleSink::Stderr,
        false => ConsoleSink::Stdout,
    };
    let vcpus = config.vcpus;
    let plan = args.snapshot_to.clone().map(|directory| SavePlan {
        directory,
        after: args.snapshot_after,
    });
    if let Some(plan) = &plan {
        disk::prepare(&plan.directory)?;
    }
    // Before the machine runs, which may take long.
    let profile = profile.map(|path| Ok::<_, Error>((path, create(path)?)));
    let profile = profile.transpose()?;
    let store = config.store.clone();
    let mut vm = Vm::new(config)?;
    match &args.name {
        Some(name) => vm.listen(name)?,
        None => {
            let name = std::process::id().to_string();
            vm.listen(&name).unwrap_or_else(|error| {
                tracing::info!("no other command can reach this machine: {error}");
            });
        }
    }
    let configuration = vm.configuration();
    let outcome = match (plan, debugger) {
        (Some(plan), _) => plan.run(vm)?,
        (None, Some(address)) => gdb::run(vm, address)?,
        (None, None) => vm.run()?,
    };
    if let Some(path) = store.filter(|_| outcome.commits == 0) {
        tracing::warn!("no checkpoint was written to `{}`", path.display());
    }
    report(args, vcpus, configuration, &outcome);
    if let Some((path, file)) = profile {
        let written = profile::Form::of(path).write(&outcome.profile, BufWriter::new(file));
        written.map_err(|error| unwritable(path, &error))?;
    }
    Ok(outcome.stop.status())
}

fn create(path: &Path) -> Result<File, Error> {
    File::create(path).map_err(|error| unwritable(path, &error))
}

fn unwritable(path: &Path, error: &io::Error) -> Error {
    Error::Config(format!("cannot write `{}`: {error}", path.display()))
}

/// What the arguments say is to be run.
fn machine(args: &RunArgs, configuration: Configuration) -> Result<VmConfig, Error> {
    let checkpoints = args.checkpoint_to.as_ref().map(|to| Checkpoints {
        to,
        after: args.checkpoint_after,
    });
    if let Some(path) = &args.restore_from {
        let name = path.display().to_string();
        let file = read_file(path)?;
        return checkpoint::restore(configuration, &name, file, checkpoints.as_ref());
    }
    let (program, arguments) = args.program.split_first().ok_or_else(no_program)?;
    if args.gdb.is_some() && matches!(program.parse(), Ok(Address::Tcp(_))) {
        let why =
            format!("`{program}` is no program; to have gdb connect there, write --gdb={program}");
        return Err(Error::Config(why));
    }
    let files = read_files(&args.file)?;
    if let Some(checkpoints) = checkpoints {
        return checkpoint::run(configuration, program, arguments, files, &checkpoints);
    }
    let mut config = VmConfig::fluke(configuration, program, arguments)?;
    for GuestFile { name, data } in files {
        config = config.file(&name, data);
    }
    Ok(config)
}

fn no_program() -> Error {
    Error::Config("no program to run; give the name of one".into())
}

/// What stands before the name of a built-in program where a path could stand.
const BUILT_IN: &str = "builtin:";

/// Reads the files that were given as a name and a path each.
pub(crate) fn read_files(files: &[(String, String)]) -> Result<Vec<GuestFile>, Error> {
    let read = |(name, path): &(String, String)| {
        let data = match path.strip_prefix(BUILT_IN) {
            Some(program) => image::program(program)?,
            None => read_file(Path::new(path))?,
        };
        Ok(GuestFile {
            name: name.clone(),
            data,
        })
    };
    files.iter().map(read).collect()
}

fn read_file(path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(|source| Error::File {
        path: path.into(),
        source,
    })
}

fn report(args: &CommonArgs, vcpus: u32, configuration: Option<Configuration>, outcome: &Outcome) {
    let stop = &outcome.stop;
    if !matches!(stop, crate::stop::StopReason::Exited(_)) {
        eprintln!("flukevm: {stop}");
    }
    for (depth, frame) in stop.crash().iter().flat_map(|c| &c.backtrace).enumerate() {
        eprintln!("  {depth:2}: {frame}");
    }
    if let Some(time) = outcome.time_to_first_user {
        tracing::info!("first user instruction after {time:.1?}");
    }
    if !outcome.counts.is_empty() {
        eprint!("{}", count::table(&outcome.counts));
    }
    if args.stats {
        eprintln!("{}", stats::table(&outcome.stats));
    }
    if args.json {
        let milliseconds = |d: Duration| d.as_secs_f64() * 1e3;
        let report = RunReport {
            stop: stop.kind(),
            message: stop.to_string(),
            status: stop.status(),
            crash: stop.crash(),
            elapsed_ms: milliseconds(outcome.elapsed),
            time_to_first_user_ms: outcome.time_to_first_user.map(milliseconds),
            vcpus,
            model: configuration.map(Configuration::model),
            preempt: configuration.map(Configuration::preempt),
            stats: &outcome.stats,
            counts: &outcome.counts,
        };
        match serde_json::to_string(&report) {
            // A reader that has gone does not want it.
            Ok(text) => drop(writeln!(io::stdout(), "{text}")),
            Err(error) => eprintln!("error: writing the JSON result: {error}"),
        }
    }
}

fn ps(json: bool) -> anyhow::Result<()> {
    let machines = client::list()?;
    print(&match json {
        true => serde_json::to_string_pretty(&machines)?,
        false => client::table(&machines),
    })
}

fn inspect(machine: &str, view: View, json: bool) -> u8 {
    if !is_saved(machine) {
        return asked(machine, &Request::Inspect(view), |answer| {
            seen(answer, json)
        });
    }
    let snapshot = match disk::load(Path::new(machine)) {
        Ok(snapshot) => snapshot,
        Err(error) => return ended(Err(error)),
    };
    match snapshot.inspect(&view) {
        Ok(report) => status(show(report, json)),
        Err(error) => {
            eprintln!("error: {error}");
            error.status()
        }
    }
}

/// Asks a machine for something, and shows the answer; the exit status.
fn asked(name: &str, request: &Request, show: impl FnOnce(Answer) -> anyhow::Result<()>) -> u8 {
    match client::ask(name, request) {
        Ok(Answer::Refused { why, status }) => {
            eprintln!("error: {why}");
            status
        }
        Ok(answer) => status(show(answer)),
        Err(error) => ended(Err(error)),
    }
}

fn done(answer: Answer) -> anyhow::Result<()> {
    match answer {
        Answer::Done(what) => print(&what),
        _ => anyhow::bail!("the machine answered something else"),
    }
}

fn seen(answer: Answer, json: bool) -> anyhow::Result<()> {
    let Answer::Seen { report, paused } = answer else {
        anyhow::bail!("the machine answered something else");
    };
    if paused {
        eprintln!("note: the machine runs; it was paused to be looked at");
    }
    show(report, json)
}

fn show(report: Report, json: bool) -> anyhow::Result<()> {
    print(&match json {
        true => serde_json::to_string_pretty(&report.json)?,
        false => report.text,
    })
}

fn api(json: bool) -> anyhow::Result<()> {
    let api = Api::new();
    print(&match json {
        true => serde_json::to_string_pretty(&api)?,
        false => api.to_text(),
    })
}

fn doctor(json: bool) -> anyhow::Result<()> {
    let report = crate::doctor::probe()?;
    print(&match json {
        true => serde_json::to_string_pretty(report)?,
        false => report.to_table(),
    })
}

/// Prints to standard output. A reader that has gone does not want it.
fn print(text: &str) -> anyhow::Result<()> {
    match writeln!(io::stdout(), "{}", text.trim_end()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_programs_own_options_are_not_ours() {
        let cli = Cli::parse_from(["flukevm", "run", "--vcpus", "4", "prog", "--vcpus", "-v"]);
        let Commands::Run(args) = cli.command else {
            panic!("not run");
        };
        assert_eq!(args.vcpus, 4);
        assert_eq!(args.program, ["prog", "--vcpus", "-v"]);
    }
}
