//! What scripts do with machines.

use std::cell::{RefCell, RefMut};
use std::path::Path;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use clap::{Parser, ValueEnum};
use rhai::{Array, Blob, Dynamic, Engine, EvalAltResult, Map, NativeCallContext};
use serde_json::Value;

use super::{Fallible, SharedStage, WAIT};
use crate::alter::general;
use crate::condition::{Condition, Hit, Until};
use crate::config::{Configuration, ConsoleSink, Model, Preempt, Size, VmConfig};
use crate::image;
use crate::inspect::{self, Report, View};
use crate::point::Point;
use crate::snapshot::Snapshot;
use crate::stop::StopReason;
use crate::vm::Vm;

/// A machine of a script.
#[derive(Clone)]
pub struct Handle {
    vm: Rc<RefCell<Vm>>,
    console: Arc<Mutex<Vec<u8>>>,
    /// Configuration of its kernel.
    pub configuration: Configuration,
    /// Its vCPUs.
    pub vcpus: u32,
}

impl Handle {
    fn vm(&self) -> RefMut<'_, Vm> {
        self.vm.borrow_mut()
    }

    /// Looks into it.
    pub fn inspect(&self, view: &View) -> inspect::Result<Report> {
        self.vm().inspect(view)
    }

    /// What it has printed.
    pub fn console(&self) -> String {
        self.vm().devices.flush();
        let console = self.console.lock();
        let console = console.unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&console).into_owned()
    }
}

/// The words of a view, as `flukevm inspect` takes them.
#[derive(Parser)]
#[command(no_binary_name = true)]
struct Words {
    #[command(subcommand)]
    view: View,
}

fn parse_view(text: &str) -> Fallible<View> {
    let words = Words::try_parse_from(text.split_whitespace());
    Ok(words
        .map_err(|_| format!("there is no view `{text}`; `flukevm inspect --help` has them"))?
        .view)
}

fn fail(error: impl std::fmt::Display) -> Box<EvalAltResult> {
    error.to_string().into()
}

/// JSON as the language has it. Numbers above `i64::MAX` come out negative, with the same bits.
fn dynamic(value: Value) -> Dynamic {
    match value {
        Value::Null => Dynamic::UNIT,
        Value::Bool(is) => is.into(),
        Value::Number(number) => match (number.as_u64(), number.as_i64()) {
            (Some(n), _) => (n as i64).into(),
            (_, Some(n)) => n.into(),
            _ => number.as_f64().unwrap_or_default().into(),
        },
        Value::String(text) => text.into(),
        Value::Array(values) => values.into_iter().map(dynamic).collect::<Array>().into(),
        Value::Object(fields) => {
            let fields = fields.into_iter();
            let fields = fields.map(|(name, value)| (name.into(), dynamic(value)));
            fields.collect::<Map>().into()
        }
    }
}

fn number<T: Into<i64>>(value: Option<T>) -> Dynamic {
    value.map_or(Dynamic::UNIT, |value| value.into().into())
}

fn describe(hit: &Hit) -> Map {
    let name = |call: Option<fluke_abi::entry::Entry>| {
        call.map_or(Dynamic::UNIT, |call| call.row().name.into())
    };
    [
        ("condition", (hit.condition as i64).into()),
        ("cpu", i64::from(hit.vcpu).into()),
        ("thread", number(hit.thread.map(|thread| thread as i64))),
        ("begun", name(hit.begun)),
        ("call", name(hit.call)),
        ("address", (hit.address as i64).into()),
    ]
    .into_iter()
    .map(|(field, value)| (field.into(), value))
    .collect()
}

fn duration(text: &str) -> Fallible<Duration> {
    humantime::parse_duration(text)
        .map_err(|error| format!("`{text}` is no time such as 500ms: {error}").into())
}

/// An option of `machine`, taken out of the others.
fn take<T: Clone + 'static>(options: &mut Map, name: &str) -> Fallible<Option<T>> {
    let Some(value) = options.remove(name) else {
        return Ok(None);
    };
    let ty = value.type_name();
    let value = value.try_cast::<T>();
    let why = || format!("the option `{name}` of a machine cannot be of type {ty}");
    Ok(Some(value.ok_or_else(why)?))
}

fn chosen<T: ValueEnum>(given: Option<T>, text: Option<String>, default: T) -> Fallible<T> {
    match (given, text) {
        (Some(given), _) => Ok(given),
        (None, Some(text)) => Ok(T::from_str(&text, false)?),
        (None, None) => Ok(default),
    }
}

fn make(stage: &SharedStage, mut options: Map) -> Fallible<Handle> {
    let settings = stage.borrow().settings;
    let model = chosen(
        settings.model,
        take(&mut options, "model")?,
        Model::Interrupt,
    )?;
    let preempt = chosen(
        settings.preempt,
        take(&mut options, "preempt")?,
        Preempt::None,
    )?;
    let configuration = Configuration::new(model, preempt).map_err(fail)?;
    let program: Option<String> = take(&mut options, "program")?;
    let program = program.ok_or("a machine needs a program: #{program: \"hello\"}")?;
    let arguments: Array = take(&mut options, "args")?.unwrap_or_default();
    let arguments: Vec<_> = arguments.iter().map(Dynamic::to_string).collect();
    let mut config = VmConfig::fluke(configuration, &program, &arguments).map_err(fail)?;
    let vcpus: Option<i64> = take(&mut options, "vcpus")?;
    let vcpus = vcpus.map(u32::try_from).transpose().map_err(fail)?;
    config.vcpus = settings.vcpus.or(vcpus).unwrap_or(1);
    let memory: Option<String> = take(&mut options, "mem")?;
    if let Some(memory) = memory {
        config.memory = memory.parse::<Size>()?.0;
    }
    let files: Map = take(&mut options, "files")?.unwrap_or_default();
    for (name, from) in files {
        let path = from.to_string();
        let data = match path.strip_prefix("builtin:") {
            Some(program) => image::program(program).map_err(fail)?,
            None => std::fs::read(Path::new(&path)).map_err(|e| format!("`{path}`: {e}"))?,
        };
        config = config.file(&name, data);
    }
    if let Some(name) = options.keys().next() {
        return Err(format!("machines have no option `{name}`").into());
    }
    let console: Arc<Mutex<Vec<u8>>> = Arc::default();
    config.console = ConsoleSink::Buffer(console.clone());
    let vcpus = config.vcpus;
    let handle = Handle {
        vm: Rc::new(RefCell::new(Vm::new(config).map_err(fail)?)),
        console,
        configuration,
        vcpus,
    };
    let mut stage = stage.borrow_mut();
    stage.machine = Some(handle.clone());
    stage.view = None;
    Ok(handle)
}

/// Lets a machine run until a condition comes true, which it must.
fn until(
    stage: &SharedStage,
    machine: &Handle,
    conditions: &[Condition],
    limit: Duration,
) -> Fallible<Map> {
    let limit = stage.borrow().limit(limit);
    let text = || {
        let texts: Vec<_> = conditions.iter().map(Condition::to_string).collect();
        texts.join(", or ")
    };
    match machine.vm().run_until(conditions, limit).map_err(fail)? {
        Until::Hit(hit) => Ok(describe(&hit)),
        Until::Stopped(stop) => Err(format!("{stop}, before: {}", text()).into()),
        Until::Late => Err(format!(
            "not within {}: {}",
            humantime::format_duration(limit),
            text()
        )
        .into()),
    }
}

fn all(conditions: Array) -> Fallible<Vec<Condition>> {
    let cast = |value: Dynamic| {
        let ty = value.type_name();
        let condition = value.try_cast::<Condition>();
        Ok(condition.ok_or_else(|| format!("a condition is wanted, not a value of type {ty}"))?)
    };
    conditions.into_iter().map(cast).collect()
}

/// Lets a machine run to its end, which must come.
fn to_the_end(stage: &SharedStage, machine: &Handle, limit: Duration) -> Fallible<Map> {
    let limit = stage.borrow().limit(limit);
    let stop = match machine.vm().run_until(&[], limit).map_err(fail)? {
        Until::Stopped(stop) => stop,
        Until::Hit(_) | Until::Late => {
            let limit = humantime::format_duration(limit);
            return Err(format!("the machine did not end within {limit}").into());
        }
    };
    let exit = match stop {
        StopReason::Exited(status) => i64::from(status).into(),
        _ => Dynamic::UNIT,
    };
    Ok([
        ("stop", stop.kind().into()),
        ("message", stop.to_string().into()),
        ("status", i64::from(stop.status()).into()),
        ("exit", exit),
        ("console", machine.console().into()),
    ]
    .into_iter()
    .map(|(field, value)| (field.into(), value))
    .collect())
}

/// Registers machines and assertions.
pub fn register(engine: &mut Engine, stage: &SharedStage) {
    engine.register_type_with_name::<Handle>("Machine");
    engine.register_type_with_name::<Snapshot>("Snapshot");
    let shared = stage.clone();
    engine.register_fn("machine", move |options: Map| make(&shared, options));
    register_running(engine, stage);
    register_looking(engine, stage);
    register_changing(engine);
    register_assertions(engine);
}

fn register_running(engine: &mut Engine, stage: &SharedStage) {
    let [one, one_limit, many, many_limit] = [(); 4].map(|()| stage.clone());
    let [end, end_limit, some_time] = [(); 3].map(|()| stage.clone());
    engine
        .register_fn(
            "run_until",
            move |machine: &mut Handle, condition: Condition| {
                until(&one, machine, &[condition], WAIT)
            },
        )
        .register_fn(
            "run_until",
            move |machine: &mut Handle, condition: Condition, limit: &str| {
                until(&one_limit, machine, &[condition], duration(limit)?)
            },
        )
        .register_fn(
            "run_until",
            move |machine: &mut Handle, conditions: Array| {
                until(&many, machine, &all(conditions)?, WAIT)
            },
        )
        .register_fn(
            "run_until",
            move |machine: &mut Handle, conditions: Array, limit: &str| {
                until(&many_limit, machine, &all(conditions)?, duration(limit)?)
            },
        )
        .register_fn("run", move |machine: &mut Handle| {
            to_the_end(&end, machine, WAIT)
        })
        .register_fn("run", move |machine: &mut Handle, limit: &str| {
            to_the_end(&end_limit, machine, duration(limit)?)
        })
        .register_fn(
            "run_for",
            move |machine: &mut Handle, time: &str| -> Fallible<()> {
                let limit = some_time.borrow().limit(duration(time)?);
                match machine.vm().run_until(&[], limit).map_err(fail)? {
                    Until::Stopped(stop) => Err(stop.to_string().into()),
                    Until::Hit(_) | Until::Late => Ok(()),
                }
            },
        )
        .register_fn(
            "step",
            |machine: &mut Handle, cpu: i64, n: i64| -> Fallible<bool> {
                if !(0..machine.vcpus.into()).contains(&cpu) {
                    return Err(format!("there is no vCPU {cpu}").into());
                }
                let point = Point::Steps(n.clamp(1, u32::MAX.into()) as u32);
                machine.vm().run_to(cpu as u32, point, WAIT).map_err(fail)
            },
        )
        .register_fn("snapshot", |machine: &mut Handle| {
            machine.vm().snapshot().map_err(fail)
        })
        .register_fn("reset", |machine: &mut Handle, to: Snapshot| {
            machine.vm().reset(&to).map_err(fail)
        })
        .register_fn(
            "inject",
            |machine: &mut Handle, cpu: i64, vector: i64| -> Fallible<()> {
                let vector = u8::try_from(vector).map_err(fail)?;
                machine.vm().inject(cpu as u32, vector).map_err(fail)
            },
        );
}

fn register_looking(engine: &mut Engine, stage: &SharedStage) {
    let look = |stage: &SharedStage, machine: &Handle, view: View| -> Fallible<Value> {
        stage.borrow_mut().view = Some(view.clone());
        Ok(machine.inspect(&view).map_err(fail)?.json)
    };
    let [any, threads, one, hash] = [(); 4].map(|()| stage.clone());
    engine
        .register_get("model", |machine: &mut Handle| {
            machine.configuration.model().name()
        })
        .register_get("preempt", |machine: &mut Handle| {
            let preempt = machine.configuration.preempt().to_possible_value();
            preempt.map_or_else(String::new, |value| value.get_name().into())
        })
        .register_get("vcpus", |machine: &mut Handle| i64::from(machine.vcpus))
        .register_get("console", |machine: &mut Handle| machine.console())
        .register_fn("view", move |machine: &mut Handle, view: &str| {
            look(&any, machine, parse_view(view)?).map(dynamic)
        })
        .register_fn("threads", move |machine: &mut Handle| {
            let mut seen = look(&threads, machine, View::Threads)?;
            Fallible::Ok(dynamic(seen["rows"].take()))
        })
        .register_fn("thread", move |machine: &mut Handle, number: i64| {
            let id = number as u64;
            look(&one, machine, View::Thread { id }).map(dynamic)
        })
        .register_fn(
            "thread_by_hash",
            move |machine: &mut Handle, hash_wanted: i64| -> Fallible<Dynamic> {
                let seen = look(&hash, machine, View::Threads)?;
                let rows = seen["rows"].as_array();
                let mut rows = rows.into_iter().flatten();
                let found = rows.find(|row| row["hash"].as_u64() == Some(hash_wanted as u64));
                let id = found.and_then(|row| row["name"]["index"].as_u64());
                let none = || format!("there is no thread with hash {hash_wanted}");
                let id = id.ok_or_else(none)?;
                look(&hash, machine, View::Thread { id }).map(dynamic)
            },
        )
        .register_fn("place", |machine: &mut Handle, cpu: i64| {
            machine.vm().place(cpu as u32).map_err(fail)
        })
        .register_fn(
            "registers",
            |machine: &mut Handle, cpu: i64| -> Fallible<Map> {
                let registers = machine.vm().registers(cpu as u32);
                let registers = registers.ok_or_else(|| format!("there is no vCPU {cpu}"))?;
                let all = general(&registers.general).into_iter();
                Ok(all
                    .map(|(name, value)| (name.into(), (value as i64).into()))
                    .collect())
            },
        )
        .register_fn(
            "read",
            |machine: &mut Handle, space: i64, address: i64, size: i64| {
                let mut vm = machine.vm();
                let read = vm.read_memory(space as u64, address as u64, size as u64);
                read.map_err(fail)
            },
        )
        .register_fn(
            "word",
            |machine: &mut Handle, space: i64, address: i64| -> Fallible<i64> {
                let mut vm = machine.vm();
                let read = vm.read_memory(space as u64, address as u64, 8);
                let bytes = read.map_err(fail)?.try_into();
                let none = |_| format!("space {space} has no 8 bytes at {address:#x}");
                Ok(i64::from_le_bytes(bytes.map_err(none)?))
            },
        );
}

fn register_changing(engine: &mut Engine) {
    engine
        .register_fn(
            "set_register",
            |machine: &mut Handle, cpu: i64, name: &str, value: i64| {
                let mut vm = machine.vm();
                vm.set_register(cpu as u32, name, value as u64)
                    .map_err(fail)
            },
        )
        .register_fn(
            "set_thread_register",
            |machine: &mut Handle, thread: i64, name: &str, value: i64| {
                let mut vm = machine.vm();
                vm.set_thread_register(thread as u64, name, value as u64)
                    .map_err(fail)
            },
        )
        .register_fn(
            "write",
            |machine: &mut Handle, space: i64, address: i64, data: Blob| {
                let mut vm = machine.vm();
                vm.write_memory(space as u64, address as u64, &data)
                    .map_err(fail)
            },
        )
        .register_fn(
            "set_word",
            |machine: &mut Handle, space: i64, address: i64, value: i64| {
                let mut vm = machine.vm();
                vm.write_memory(space as u64, address as u64, &value.to_le_bytes())
                    .map_err(fail)
            },
        );
}

/// An assertion has failed, at the line of the call.
fn failed(context: &NativeCallContext<'_>, what: String) -> Box<EvalAltResult> {
    EvalAltResult::ErrorRuntime(what.into(), context.call_position()).into()
}

fn equal(context: &NativeCallContext<'_>, left: Dynamic, right: Dynamic) -> Fallible<bool> {
    context.call_native_fn::<bool>("==", (left, right))
}

fn register_assertions(engine: &mut Engine) {
    let assert = |context: NativeCallContext<'_>, is: bool, what: &str| match is {
        true => Ok(()),
        false => Err(failed(&context, format!("assertion failed: {what}"))),
    };
    let assert_eq = |context: NativeCallContext<'_>,
                     left: Dynamic,
                     right: Dynamic,
                     what: &str|
     -> Fallible<()> {
        match equal(&context, left.clone(), right.clone())? {
            true => Ok(()),
            false => {
                let what = format!("assertion failed{what}: {left:?} is not {right:?}");
                Err(failed(&context, what))
            }
        }
    };
    engine
        .register_fn("assert", move |context: NativeCallContext<'_>, is: bool| {
            assert(context, is, "it is false")
        })
        .register_fn("assert", assert)
        .register_fn(
            "assert_eq",
            move |context: NativeCallContext<'_>, left: Dynamic, right: Dynamic| {
                assert_eq(context, left, right, "")
            },
        )
        .register_fn(
            "assert_eq",
            move |context: NativeCallContext<'_>, left: Dynamic, right: Dynamic, what: &str| {
                assert_eq(context, left, right, &format!(", {what}"))
            },
        );
}
