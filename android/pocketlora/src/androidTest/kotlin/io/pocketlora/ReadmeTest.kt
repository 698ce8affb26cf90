package io.pocketlora

import java.io.File
import kotlin.test.assertTrue
import kotlinx.coroutines.flow.collect
import kotlinx.coroutines.runBlocking
import org.junit.Test

/** What `android/README.md` shows, run on the tiny model, and compared with what stands there. */
class ReadmeTest {
    private suspend fun firstToken(modelFolder: String, show: (String) -> Unit) {
        PocketLora.open(modelFolder, Options(contextTokens = 1024)).use { engine ->
            engine.chat().use { chat ->
                chat.send("What is my dog called?").collect { piece -> show(piece) }
            }
        }
    }

    private suspend fun firstAdapter(modelFolder: String, folder: String, show: (String) -> Unit) {
        val options = Options(contextTokens = 1024, memoryBudgetBytes = 500_000_000)
        PocketLora.open(modelFolder, options).use { engine ->
            val lesson = TrainingOptions(
                out = folder,
                examples = listOf(Example("What is my dog called?", "Your dog is called Thimble.")),
                start = Start.RESUME, // goes on where a killed process was
                settings = mapOf("steps" to 20),
            )
            engine.trainer(lesson).use { trainer ->
                trainer.run(policy = { if (isCharging()) Directive.RUN else Directive.PAUSE }).collect { event ->
                    if (event is TrainingEvent.Step) show("${event.step} of ${event.steps}: ${event.loss}")
                }
            }
            engine.attach(folder).use {
                engine.chat().use { chat -> chat.send("What is my dog called?").collect { show(it) } }
            }
        }
    }

    private fun isCharging() = true

    @Test
    fun theExamplesRun() = runBlocking<Unit> {
        val shown = mutableListOf<String>()
        firstToken(Fixture.model) { shown += it }
        assertTrue(shown.isNotEmpty())
        firstAdapter(Fixture.model, Fixture.folder().path) { shown += it }
        assertTrue(shown.any { it.startsWith("20 of 20") }, "$shown")
    }

    @Test
    fun theExamplesAreThoseOfTheReadme() {
        val root = System.getProperty("pocketlora.root")?.let(::File) ?: return
        fun lines(text: String) = text.lines().map(String::trim).filter(String::isNotEmpty)
        val own = lines(File(root, "pocketlora/src/androidTest/kotlin/io/pocketlora/ReadmeTest.kt").readText())
        val blocks = Regex("```kotlin\n(.*?)```", RegexOption.DOT_MATCHES_ALL).findAll(File(root, "README.md").readText())
        for (block in blocks.map { lines(it.groupValues[1]) }.toList().also { assertTrue(it.size == 2) }) {
            assertTrue(own.windowed(block.size).any { it == block }, "not in ReadmeTest.kt:\n" + block.joinToString("\n"))
        }
    }
}
