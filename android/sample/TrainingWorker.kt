package io.pocketlora.sample

// Not compiled here: it needs Android and androidx.work. See README.md.

import android.content.Context
import android.os.Build
import android.os.PowerManager
import androidx.work.Constraints
import androidx.work.CoroutineWorker
import androidx.work.ExistingWorkPolicy
import androidx.work.OneTimeWorkRequestBuilder
import androidx.work.WorkManager
import androidx.work.WorkerParameters
import androidx.work.workDataOf
import io.pocketlora.Directive
import io.pocketlora.Options
import io.pocketlora.PocketLora
import io.pocketlora.PocketLoraException
import io.pocketlora.Start
import io.pocketlora.TrainingEvent
import io.pocketlora.TrainingOptions
import kotlinx.coroutines.flow.collect

/**
 * Goes on with the run in a folder while the phone charges, is idle and cool. The app has prepared the run once, with its
 * examples, by `engine.trainer`. When the system takes the constraints away, it cancels the worker: the run stops within the
 * time of a layer, with a checkpoint. A killed process loses the steps since the last one (`save-every`).
 */
class TrainingWorker(context: Context, parameters: WorkerParameters) : CoroutineWorker(context, parameters) {
    override suspend fun doWork(): Result {
        val model = inputData.getString(MODEL) ?: return Result.failure()
        val run = inputData.getString(RUN) ?: return Result.failure()
        return try {
            PocketLora.open(model, Options(contextTokens = 1024, memoryBudgetBytes = BUDGET)).use { engine ->
                engine.trainer(TrainingOptions(run, start = Start.RESUME, choose = false)).use { trainer ->
                    var done = false
                    trainer.run(::policy).collect { event ->
                        when (event) {
                            is TrainingEvent.Step -> setProgress(workDataOf(STEP to event.step, STEPS to event.steps))
                            is TrainingEvent.End -> done = event.done
                            else -> {}
                        }
                    }
                    if (done) Result.success() else Result.retry()
                }
            }
        } catch (e: PocketLoraException) {
            // Another time there may be more room; anything else stays wrong.
            val again = e is PocketLoraException.OutOfMemory || e is PocketLoraException.Io
            if (again) Result.retry() else Result.failure(workDataOf(ERROR to e.message, CODE to e.code))
        }
    }

    /** Waits while the phone is warm. It is asked between layers, and must be quick. */
    private fun policy(): Directive {
        if (Build.VERSION.SDK_INT < 29) return Directive.RUN
        val power = applicationContext.getSystemService(PowerManager::class.java)
        val warm = power.currentThermalStatus >= PowerManager.THERMAL_STATUS_MODERATE
        return if (warm) Directive.PAUSE else Directive.RUN
    }

    companion object {
        const val MODEL = "model"
        const val RUN = "run"
        const val STEP = "step"
        const val STEPS = "steps"
        const val ERROR = "error"
        const val CODE = "code"
        private const val BUDGET = 500_000_000L

        fun enqueue(context: Context, model: String, run: String) {
            val constraints = Constraints.Builder()
                .setRequiresCharging(true)
                .setRequiresBatteryNotLow(true)
                .setRequiresDeviceIdle(true)
                .setRequiresStorageNotLow(true)
                .build()
            val request = OneTimeWorkRequestBuilder<TrainingWorker>()
                .setConstraints(constraints)
                .setInputData(workDataOf(MODEL to model, RUN to run))
                .build()
            WorkManager.getInstance(context).enqueueUniqueWork(run, ExistingWorkPolicy.KEEP, request)
        }
    }
}
