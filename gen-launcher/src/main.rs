//! The launcher; everything is in the library.

use clap::Parser;
use grail_gen_launcher::launcher::args::{LauncherArgs, Task};
use grail_gen_launcher::launcher::{service, standalone};
use grail_process::ExitCode;
use grail_telemetry::{Format, Options};

fn main() -> ExitCode {
    let args = match LauncherArgs::try_parse() {
        Ok(args) => args,
        Err(error) => {
            let is_wrong = error.use_stderr();
            return if error.print().is_err() || is_wrong { ExitCode::Usage } else { ExitCode::Done };
        }
    };
    if let Err(error) = grail_telemetry::init(&Options::from_environment(args.verbose, Format::Human)) {
        eprintln!("grail-gen-launcher: {error}");
        return ExitCode::Configuration;
    }
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "Cannot start the runtime.");
            return ExitCode::Temporary;
        }
    };
    let ended: anyhow::Result<()> = runtime.block_on(async {
        match &args.task {
            Task::Serve(args) => service::serve(args).await.map_err(Into::into),
            Task::Run(args) => standalone::run(args).await.map_err(Into::into),
        }
    });
    match ended {
        Ok(()) => ExitCode::Done,
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "The launcher ends.");
            ExitCode::Temporary
        }
    }
}
